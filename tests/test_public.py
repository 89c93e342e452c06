"""What is public: documented in a guide, in the registry, and in the site's index."""

import importlib
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pdoc
import pytest

import optaxclip
from registry import LIMITS, REGISTRY

pytestmark = pytest.mark.usefixtures("quick_by_default")

GUIDES = ["", ".norms", ".limits", ".clipping", ".explosions", ".recording"]
GUIDES += [".reporting", ".trainers", ".tracking"]
# What is neither a transformation nor a limit, but measures or reads.
READERS = {"keep", "taken", "skipped_steps", "leading_leaf"} | {
    "explain",
    "history",
    "metrics",
    "plot",
    "raise_if_exploded",
}
READERS |= {"global_norm", "leaf_norms", "unit_norms", "group_norms"}
READERS |= {"leaf_names", "group_names"}
# For transformations and limits of one's own.
INTERNAL = {"as_limit", "Limit", "LimitLike"}


def public(module: Any) -> dict[str, Any]:
    """What a module offers under a name of its own."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


TOP, OF_LIMITS = public(optaxclip), public(optaxclip.limits)


def guides() -> str:
    modules = [importlib.import_module(f"optaxclip{name}") for name in GUIDES]
    return "\n".join(module.__doc__ or "" for module in modules)


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
    if not name.endswith("State") and name not in INTERNAL:
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
    assert transformations == functions - READERS
    functions = {name for name, value in OF_LIMITS.items() if inspect.isfunction(value)}
    assert set(LIMITS) == functions - INTERNAL


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


@pytest.mark.slow
def test_the_site_has_a_page_for_each_guide_and_an_entry_for_each_name(tmp_path):
    with warnings.catch_warnings():
        # pdoc looks for the annotations of a named tuple in the wrong module.
        warnings.filterwarnings("ignore", "Error parsing type annotation")
        pdoc.pdoc("optaxclip", output_directory=tmp_path)
    pages = [f"optaxclip{name}".replace(".", "/") + ".html" for name in GUIDES]
    for page in pages:
        html = (tmp_path / page).read_text()
        assert "<table>" in html, page
        assert not re.search(r"^\s*\| ?---", html, re.MULTILINE), page
    index = (tmp_path / "search.js").read_text()
    for value in (TOP | OF_LIMITS).values():
        if inspect.isfunction(value) or inspect.isclass(value):
            assert f'"{value.__qualname__}"' in index, value


def test_links_to_files_lead_somewhere():
    root = Path(__file__).parents[1]
    folders = ["", "examples", "examples/studies", "tests/benchmarks"]
    files = [root / folder / "README.md" for folder in folders]
    for path in [*files, root / "CHANGELOG.md"]:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
        for link in links:
            if "://" not in link:
                assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_metrics_that_examples_and_guides_name_are_documented():
    """A metric that is renamed is renamed there too."""
    documented = set(re.findall(r"`(\w+/\w+)[`/]", optaxclip.metrics.__doc__ or ""))
    documented |= {"explosions/loss_limit"}  # stands beside another
    # Detectors have the metrics of a record as well.
    documented |= {x.replace("gradients/", "explosions/") for x in documented}
    root = Path(__file__).parents[1]
    scripts = [*root.glob("examples/*.py"), *root.glob("examples/studies/*.py")]
    texts = [path.read_text() for path in scripts]
    named = {
        name
        for text in (*texts, (root / "README.md").read_text(), guides())
        for name in re.findall(r"[\"'`]((?:clip|explosions|gradients)/\w+)", text)
    }
    assert len(named) > 10
    assert named <= documented
