"""The rules of the layers that are known."""
