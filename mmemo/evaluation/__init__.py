"""How good is a model, how sure is that, and what does it listen to?

`metrics`: scores, their intervals by speaker, paired comparisons, linear probes. Begin here with
`score_intervals` and `compare`.
`intervals`: what they stand on: people and seeds both random (`two_way`), families of claims
(`holm`).
`xray`: how much of each named cause a model's predictions follow, and how near it is to the best
possible score of its kind.
`figures`: pictures of both: the staircase, the X-ray, confusion, calibration, a comparison.
`robustness`: scores on test sets that are damaged in the same way for every model, beside the
best that is then possible.
`protocols`: splits that keep people apart and refuse five known mistakes; leave one speaker,
session or published fold out.
`speakers`: how well the speaker can be named from an embedding, and models that are tested on
another corpus.
`seeds`: how alike the runs of one recipe are, and which of them went wrong.
"""
