from tests.bot.conftest import tiny_model_dir

__all__ = ["tiny_model_dir"]  # a fixture of the services' tests
