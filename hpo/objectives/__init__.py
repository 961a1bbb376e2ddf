"""The objectives that come with hpo; their modules are the files of the project's folder `objectives/`.

They are part of this package, so that a folder of a user's own that is named `objectives` shadows nothing. A wheel has
the files here in place of this one (`package-dir` in pyproject.toml); a checkout has them beside the package.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "objectives")]
