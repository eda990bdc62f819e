"""Which blocks on which actor, which actor on which host; costs of steps and links."""
