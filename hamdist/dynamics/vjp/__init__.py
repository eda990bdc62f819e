"""The local function f of a block and its vector-Jacobian products, by autograd or closed form."""
