"""The tiny models and the small real one of the engine's tests serve here as well."""

from tests.engine.conftest import smollm2, tiny  # noqa: F401
