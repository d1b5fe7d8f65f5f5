"""model file -> Potential: the interface of every trained potential, and the parts that families share.

A `Potential` is a `torch.nn.Module` whose `forward(batch)` predicts energies (training) and whose
`evaluator(batch)` returns the function that molecular dynamics calls. Families are found by name in `family`.
"""
