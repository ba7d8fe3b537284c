"""The equations of a jaxpr, whatever calls and loops they are in."""


def equations(jaxpr):
    """Every equation, those of inner jaxprs included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)
