"""The study of the propagation speed c."""
