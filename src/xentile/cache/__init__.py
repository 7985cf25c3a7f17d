"""A teacher's top-K entries on disk: written while the teacher runs, read at random while a student trains.

A cache is a folder: `header.json` (teacher, vocabulary, K, temperatures, tokenizer, version of the format), for each
rank that wrote a JSON Lines index with a checksum a line, and safetensors shards. A token takes 238 bytes at K = 64
and a vocabulary of 2^20, and less for smaller ones; `packing` says how, `python -m xentile cache inspect` how much.
"""

from xentile.cache.errors import DamagedCacheError
from xentile.cache.header import CacheHeader, tokenizer_hash
from xentile.cache.reader import CachedTopK, TopKCache
from xentile.cache.writer import TopKCacheWriter

__all__ = [
    "CacheHeader",
    "CachedTopK",
    "DamagedCacheError",
    "TopKCache",
    "TopKCacheWriter",
    "tokenizer_hash",
]
