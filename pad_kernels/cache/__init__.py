"""Teacher outputs on disk: run the teacher's head over a dataset once, train from the result.

`write_teacher_cache` (or `TeacherCacheWriter`, batch by batch) writes, `TeacherCache` reads,
`CacheInfo` says whose outputs they are. docs/cache.md has the format and an example. The rest of
the library imports none of this, and none of this imports transformers.
"""

from importlib.util import find_spec

_MISSING = [name for name in ("safetensors", "numpy", "tqdm") if find_spec(name) is None]
if _MISSING:
    raise ImportError(
        f"pad_kernels.cache needs {', '.join(_MISSING)}: pip install 'pad-kernels[cache]'"
    )

from pad_kernels.cache.info import CacheInfo, tokenizer_hash  # noqa: E402
from pad_kernels.cache.reader import CachedRows, TeacherCache  # noqa: E402
from pad_kernels.cache.writer import TeacherCacheWriter, write_teacher_cache  # noqa: E402

__all__ = [
    "CacheInfo",
    "CachedRows",
    "TeacherCache",
    "TeacherCacheWriter",
    "tokenizer_hash",
    "write_teacher_cache",
]
