"""One pass through a model for the stores of several configs; calls that take one or several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError

_P = ParamSpec("_P")
_Result = TypeVar("_Result")


class _ForOneOrSeveral(Protocol[_P, _Result]):
    @overload
    def __call__(
        self, cache: EmbeddingCache, config: CacheConfig, *args: _P.args, **kwargs: _P.kwargs
    ) -> _Result: ...
    @overload
    def __call__(
        self,
        cache: EmbeddingCache,
        config: Sequence[CacheConfig],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> list[_Result]: ...


def for_one_or_several(
    function: Callable[Concatenate[EmbeddingCache, Any, _P], list[_Result]],
) -> _ForOneOrSeveral[_P, _Result]:
    """Let a call with one config return its result, where several give a list.

    Args:
        function: Its second argument is a config, or several.
    """

    @functools.wraps(function)
    def call(cache: EmbeddingCache, config: Any, *args: Any, **kwargs: Any) -> Any:
        found = function(cache, config, *args, **kwargs)
        return found[0] if isinstance(config, CacheConfig) else found

    return call


def configs_of_one_pass(config: CacheConfig | Sequence[CacheConfig]) -> list[CacheConfig]:
    """Return the configs that one run fills.

    Raises:
        ConfigError: There is none or one twice, or they differ in more than `output` and `dtype`.
    """
    configs = [config] if isinstance(config, CacheConfig) else list(config)
    if not configs:
        raise ConfigError("config: an empty list; give a CacheConfig or several")
    for number, one in enumerate(configs):
        if one in configs[:number]:
            raise ConfigError(f"config: {one.output!r} as {one.dtype} is in the list twice")
        for field, (ours, first) in one.differences(configs[0]).items():
            if field not in ("output", "dtype"):
                raise ConfigError(
                    f"{field}: {ours!r} and {first!r}; configs of one extraction share decoding "
                    "and forward passes, and differ in `output` and `dtype` only. Extract the "
                    "others in a separate call"
                )
    return configs
