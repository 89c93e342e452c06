"""What is public: documented in a guide, in the registry, and in the site's index."""

import importlib
import inspect
import operator
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pdoc
import pdoc.doc
import pdoc.render
import pytest

import optaxclip
from registry import LIMITS, REGISTRY

pytestmark = pytest.mark.usefixtures("quick_by_default")

GUIDES = ["", ".norms", ".limits", ".clipping", ".explosions", ".recording"]
GUIDES += [".reporting", ".trainers", ".tracking"]
ROOT = Path(__file__).parents[1]
# Not in the registry, whose laws run `init` and `update`: these have neither. They read
# a state or measure a tree, and are tested in `tests/reporting` and `tests/norms`.
READERS = {"explain", "history", "keep", "leading_leaf", "metrics", "plot"}
READERS |= {"raise_if_exploded", "skipped_steps", "taken"}
MEASURES = {"global_norm", "leaf_norms", "unit_norms", "group_norms"}
MEASURES |= {"leaf_names", "group_names"}
# Makes a limit of what is given for one, and is none itself.
NO_LIMIT = {"as_limit"}


def public(module: Any) -> dict[str, Any]:
    """What a module offers under a name of its own."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


TOP, OF_LIMITS = public(optaxclip), public(optaxclip.limits)


# In no guide: the types of what `init` returns. Nobody has to write their names; the
# site documents their fields.
STATES = {name for name in TOP | OF_LIMITS if name.endswith("State")}


def guide(name: str) -> str:
    return importlib.import_module(f"optaxclip{name}").__doc__ or ""


def guides() -> str:
    return "\n".join(map(guide, GUIDES))


def test_what_is_public():
    """A name that is added or removed is added to or removed from this list."""
    assert sorted(TOP) == [
        "ClipByNormState",
        "ClipByValueState",
        "DetectExplosionsState",
        "ExplosionError",
        "History",
        "RecordState",
        "SkipExplosionsState",
        "SpamState",
        "adagc",
        "agc",
        "aggc",
        "autoclip",
        "block_rms",
        "clip_by_historical_norm",
        "clip_by_norm",
        "clip_by_spectral_norm",
        "clip_by_value",
        "detect_explosions",
        "explain",
        "global_norm",
        "gradient_stabilizer",
        "group_names",
        "group_norms",
        "history",
        "keep",
        "leading_leaf",
        "leaf_names",
        "leaf_norms",
        "metrics",
        "plot",
        "raise_if_exploded",
        "record",
        "scale_params",
        "skip_explosions",
        "skipped_steps",
        "spam",
        "stabilize",
        "stable_adam",
        "taken",
        "unit_norms",
        "zclip",
    ]


def test_the_lists_of_public_names_are_whole():
    guides_of_top = [name.removeprefix(".") for name in GUIDES if name]
    assert set(optaxclip.__all__) == {*TOP, *guides_of_top}
    assert set(optaxclip.limits.__all__) == set(OF_LIMITS)


@pytest.mark.parametrize("name", [*TOP, *OF_LIMITS])
def test_a_public_name_is_documented_and_in_a_guide(name):
    value = (TOP | OF_LIMITS)[name]
    if name != "LimitLike":
        assert value.__doc__
        assert "Alias for field" not in value.__doc__
    if name not in STATES:
        assert re.search(rf"\b{name}\b", guides()), f"{name} is in no guide"


@pytest.mark.parametrize("name", [x for x in TOP if inspect.isfunction(TOP[x])])
def test_a_docstring_has_every_section(name):
    value = TOP[name]
    returned = inspect.signature(value).return_annotation
    end = "Raises:" if returned in (None, "None") else "Returns:"
    takes = ["Args:"] if inspect.signature(value).parameters else []
    for section in (*takes, end, "Example:"):
        assert section in value.__doc__, section


def test_the_guide_names_where_it_is_no_argument():
    clips = {
        name
        for name, function in inspect.getmembers(optaxclip, inspect.isfunction)
        if function.__module__.startswith("optaxclip.clipping")
    }
    functions = {name for name, value in TOP.items() if inspect.isfunction(value)}
    taken = {
        name for name in functions if "where" in inspect.signature(TOP[name]).parameters
    }
    assert taken == clips - {"clip_by_value", "scale_params"}
    guide = " ".join((optaxclip.__doc__ or "").split())
    assert "all clips but `clip_by_value` and `scale_params`; norms" in guide


def test_the_registry_holds_every_transformation_and_every_limit():
    transformations = {name.split()[0] for name in REGISTRY}
    functions = {name for name, value in TOP.items() if inspect.isfunction(value)}
    assert transformations == functions - READERS - MEASURES
    functions = {name for name, value in OF_LIMITS.items() if inspect.isfunction(value)}
    assert set(LIMITS) == functions - NO_LIMIT


@pytest.mark.parametrize(
    ("folder", "names"), [("reporting", READERS), ("norms", MEASURES)]
)
def test_what_is_not_in_the_registry_has_tests_of_its_own(folder, names):
    files = ROOT.glob(f"tests/{folder}/test_*.py")
    tests = "\n".join(path.read_text() for path in files)
    assert {x for x in names if not re.search(rf"optaxclip\.{x}\(", tests)} == set()


def test_a_limit_has_a_naive_reference_or_says_why_not():
    reasons = {name: row.why_none for name, row in LIMITS.items() if row.why_none}
    without = {name for name, row in LIMITS.items() if row.reference is None}
    assert set(reasons) == without
    # One more without a reference is one more here.
    assert without == {"constant", "schedule", "params", "rms", "with_global"}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_keeps_the_type_of_its_state_and_is_never_negative(name):
    row, norms = LIMITS[name], jnp.array([1.0, 2.0])
    limit = row.make(**row.least)
    state, update = limit.init(jnp.array([3.0, 4.0])), jax.jit(limit.update)
    for scale in (1.0, 1.5, jnp.inf, 0.0, 30.0):
        found, new = update(norms * scale, state, norms)
        types = [
            jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
            for tree in (state, new)
        ]
        assert types[0] == types[1]
        assert jnp.all(found >= 0)
        state = new


@pytest.fixture
def _quiet_pdoc():
    with warnings.catch_warnings():
        # pdoc looks for the annotations of a named tuple in the wrong module.
        warnings.filterwarnings("ignore", "Error parsing type annotation")
        yield


@pytest.mark.usefixtures("_quiet_pdoc")
def test_the_site_has_an_entry_for_each_name():
    """In the index of the two modules that have all names; the pages are slow."""
    public_names = {"optaxclip": TOP, "optaxclip.limits": OF_LIMITS}
    modules = {name: pdoc.doc.Module.from_name(name) for name in public_names}
    index = pdoc.render.search_index(modules)
    for module, names in public_names.items():
        for name in names:
            assert f'"{module}.{name}"' in index, name


@pytest.mark.slow
@pytest.mark.usefixtures("_quiet_pdoc")
def test_the_site_has_a_page_for_each_guide(tmp_path):
    pdoc.pdoc("optaxclip", output_directory=tmp_path)
    for name in GUIDES:
        html = (tmp_path / f"optaxclip{name}".replace(".", "/")).with_suffix(".html")
        page = html.read_text()
        assert ("<table>" in page) == ("|---|" in guide(name)), name
        assert not re.search(r"^\s*\| ?---", page, re.MULTILINE), name


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    code = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", code.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


def test_links_to_files_and_headings_lead_somewhere():
    pages = [path for path in ROOT.rglob("*.md") if ".venv" not in path.parts]
    assert len(pages) >= 7
    num_anchors = 0
    for path in pages:
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if "://" in link:
                continue
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), f"{path.name} links to {link}"
            if anchor:
                num_anchors += 1
                assert anchor in anchors_of(target.read_text()), link
    assert num_anchors > 0


def test_what_docstrings_and_pages_refer_to_exists():
    """Files, `help(...)` and the headings of guides, in the package and in pages."""
    files = [*ROOT.glob("optaxclip/**/*.py"), *ROOT.glob("*.md")]
    files += [*ROOT.glob("examples/**/*.md"), *ROOT.glob(".github/*.md")]
    num_files = num_helps = num_headings = 0
    for path in files:
        text = " ".join(path.read_text().split())
        named = r"(?:tests|examples|optaxclip|\.github)/[\w./]*\w\.(?:py|md|png)"
        for file in re.findall(rf"(?<![\w/.]){named}", text):
            num_files += 1
            assert (ROOT / file).exists(), f"{path.name} names {file}"
        for name in re.findall(r"help\(optaxclip\.?([\w.]*)\)", text):
            num_helps += 1
            assert not name or operator.attrgetter(name)(optaxclip).__doc__
        quoted = r'"([A-Z][^"]+)" in `help\(optaxclip(.*?)\)`'
        for title, name in re.findall(quoted, text):
            num_headings += 1
            assert f"# {title}\n" in guide(name), f"{path.name} names {title}"
    assert num_files > 20
    assert num_helps > 20
    assert num_headings > 2


def test_metrics_that_examples_and_guides_name_are_documented():
    """A metric that is renamed is renamed there too."""
    documented = set(re.findall(r"`(\w+/\w+)[`/]", optaxclip.metrics.__doc__ or ""))
    documented |= {"explosions/loss_limit"}  # stands beside another
    # Detectors have the metrics of a record as well.
    documented |= {x.replace("gradients/", "explosions/") for x in documented}
    scripts = [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/studies/*.py")]
    texts = [path.read_text() for path in scripts]
    named = {
        name
        for text in (*texts, (ROOT / "README.md").read_text(), guides())
        for name in re.findall(r"[\"'`]((?:clip|explosions|gradients)/\w+)", text)
    }
    assert len(named) > 10
    assert named <= documented
