"""fastcap: fused kernels for training image captioners, on a CPU and on GPUs.

`fastcap.functional` and `fastcap.nn` hold the losses; `fastcap.backend` and `fastcap.backends` choose and list what runs
them; the command `fastcap` trains, captions and measures.
"""

from pathlib import Path as _Path

# In a source tree `kernels/` and `benchmarks/` lie beside this package and are part of it; an installed one has them inside.
_source = _Path(__file__).resolve().parent.parent
if (_source / "kernels" / "_common.py").is_file() and (_source / "csrc").is_dir():
    __path__.append(str(_source))

from fastcap import functional, nn  # noqa: E402
from fastcap.errors import BackendUnavailable, FastcapError  # noqa: E402
from fastcap.ops._backend import backend, backends  # noqa: E402

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "FastcapError", "backend", "backends", "functional", "nn"]
