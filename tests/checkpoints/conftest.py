from tests.training.conftest import whole  # noqa: F401 - a fixture
