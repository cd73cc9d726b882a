"""Triton kernels, one file per op: `from roro_fast.kernels import router_score`.

The sources stand in `kernels/` at the top of the repository. A wheel carries them in this directory; in a checkout or
an editable install this package looks them up there. `kernels/` itself has no `__init__.py`, so that it never hides
the Hugging Face package of that name from `import kernels`.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "csrc" / "bind_host.cpp").is_file():
    __path__.append(str(_root / "kernels"))
