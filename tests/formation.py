"""The walk over a jaxpr that proves that nothing of a weight's size was computed."""

import jax.extend.core as jex


def formed(closed, weight_invars, size):
    """Equations, at any depth, that compute an array of `size` elements from anything but the weight alone.

    The plain model may cast or reverse a weight; what it may not do is to mix it with its factors.
    `weight_invars` are the positions of the weights among the inputs.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    return _walk(jaxpr, {jaxpr.invars[index] for index in weight_invars}, size)[0]


def _walk(jaxpr, plain, size):
    """The offending equations, and which outputs are views of the plain weight."""
    plain, found = set(plain), []

    def is_plain(atom):
        return not isinstance(atom, jex.Literal) and atom in plain

    for eqn in jaxpr.eqns:
        # What is cut out of the weight by an index is still the weight alone: integers do not count.
        inputs = [
            atom
            for atom in eqn.invars
            if str(getattr(atom.aval, "dtype", "")).startswith(("float", "bfloat"))
        ]
        viewed = [
            bool(inputs) and all(map(is_plain, inputs)) or eqn.primitive.name.startswith("empty")
        ] * len(eqn.outvars)
        # (jax 0.10 leaves `empty` slots for the residuals of a branch of `cond` that is not taken, in the
        # plain model too.)
        inner = list(_inner(eqn))
        for position, (sub, operands) in enumerate(inner):
            sub = getattr(sub, "jaxpr", sub)
            below = {var for var, atom in zip(sub.invars, operands, strict=True) if is_plain(atom)}
            offending, outputs = _walk(sub, below, size)
            found += offending
            if len(outputs) == len(viewed):
                viewed = [a and (position == 0 or b) for a, b in zip(outputs, viewed, strict=True)]
        for var, view in zip(eqn.outvars, viewed, strict=True):
            if view:
                plain.add(var)
            elif (
                not inner
                and getattr(var.aval, "size", 0) == size
                and str(var.aval.dtype).startswith(("float", "bfloat"))
            ):
                found.append(eqn)
    return found, [is_plain(atom) for atom in jaxpr.outvars]


def _inner(eqn):
    """The inner jaxprs of an equation with the operands that they take."""
    name, params, operands = eqn.primitive.name, eqn.params, list(eqn.invars)
    if name == "while":
        first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        yield params["cond_jaxpr"], operands[:first] + operands[last:]
        yield params["body_jaxpr"], operands[first:]
    elif name == "cond":
        for branch in params["branches"]:
            yield branch, operands[1:]
    else:
        for key in ("jaxpr", "call_jaxpr"):
            if key in params:
                yield params[key], operands
