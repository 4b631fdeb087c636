"""The method and its networks in plain NumPy and PyTorch, to compare with."""
