"""The rows of BERT's layers, which several families share."""


def layers_of_bert(prefix: str, query: str, key: str, value: str) -> str:
    """Families differ in the names of the projections only."""
    weights = [
        *(f"attention.self.{name}" for name in (query, key, value)),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    rows = []
    for name in weights:
        ours = name.replace(".", "/")
        rows.append(f"{prefix}encoder.layer.{{}}.{name}.weight encoder/layer/{{}}/{ours}/kernel *")
        rows.append(f"{prefix}encoder.layer.{{}}.{name}.bias encoder/layer/{{}}/{ours}/bias")
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        ours = name.replace(".", "/")
        rows.append(f"{prefix}encoder.layer.{{}}.{name}.weight encoder/layer/{{}}/{ours}/scale")
        rows.append(f"{prefix}encoder.layer.{{}}.{name}.bias encoder/layer/{{}}/{ours}/bias")
    return "\n".join(rows)
