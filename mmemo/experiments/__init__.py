"""Experiments as data: a recipe in, a trained and measured run out. Begin with `recipe` and `run`.

- `recipe`: an experiment as a page of data, at three scales; `load_recipe` reads one.
- `schema`: the parts of a recipe and what may stand in each.
- `reading`: strict YAML, and what is wrong with a recipe in one line.
- `recipe_checks`: what two parts of a recipe mean together.
- `catalogue`: the encoders, corpora and protocols that come with mmemo, with their options.
- `sources`: one data path for every corpus, in memory or in a folder.
- `encoders`: how the encoders that a recipe names are put together from stages.
- `build`: from a recipe to a model, an objective and a course.
- `results`: who was learned from, who was tested, and what was said about them.
- `records`: what a run measured, number by number, as it stands in metrics.json.
- `fold_training`: the training of one fold, in named steps.
- `run`: from a recipe to its numbers, and from a run's folder back to its model.
- `suite`: several experiments that differ in what each of them changes.
- `report`: the runs of a suite, compared, drawn and written down.
- `ladder`: the six rungs, each one idea above the one below.
- `baselines`: the static model on real people, under honest protocols.
- `notebooks`: run notebooks, executed unattended.
- `terminal`: errors in one line, exit codes and tables in a terminal.
"""
