"""The Web API's methods by family, each from checked arguments to an answer."""
