"""bench: figures anyone can reproduce.

Time and memory of these models do not depend on the values of their weights: checkpoints of random numbers at the true
sizes are measured, with no download. Stands above all other rooms; nothing imports it but the verb `lowvram bench`.
"""

if __name__ != "lowvram.bench":
    raise ImportError(f"import lowvram.bench, not {__name__}")
