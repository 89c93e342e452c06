"""Prints the oldest versions that the library supports, as pip takes them."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
oldest = [x.replace(">=", "==") for x in project["project"]["dependencies"]]
jaxlib = [x.replace("jax==", "jaxlib==") for x in oldest if x.startswith("jax==")]
print(*oldest, *jaxlib)
