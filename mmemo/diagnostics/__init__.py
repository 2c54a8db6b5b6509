"""What is wrong with a model, before, while and after it is trained?

`drawing`: tables for a terminal and a notebook, and diagrams in SVG; no model is needed.
`reach`, `routes`: how many frames of its input an output depends on, followed operation by
operation; what each operation of torch does with the axes.
`calls`, `walk`: what every module returned and what it cost; one batch's way through a model as
a table. Begin here with `walk`.
`pitfalls`: four errors of training code that never raise, and a check for each.
`checks`, `contracts`: one piece of a model alone and a table of what was found; what each piece
promises, without any training.
`capacity`, `component`: can it learn eight items by heart, whole and branch by branch; the test
before every long training, `check_pieces`.
`faults`, `planted`: which operation made the first value that is not finite; faults to order, to
test whatever claims to find them.
`replay`, `guard`: one bad update done again until its cause is found; a training that stops at
its first bad update and leaves a report, `Guard`.
"""
