"""What several test files share: batches, oracles, and the tools that look at compiled kernels."""

import pkgutil

import pytest

# Their assertions say what was compared, as those of test files do.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
