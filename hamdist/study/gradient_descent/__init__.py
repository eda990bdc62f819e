"""The study that recovers gradient descent from the equations."""
