"""Training a model: what is made small, one update, and the loop around it. Begin with `loop`.

- `objectives`: what a model is trained to make small: squared error, its root, cross-entropy,
  concordance. None of them turns into NaN where no label is known.
- `multitask`: a weighted sum of objectives, and weights for rare classes.
- `contrastive`: items of one label near each other in the embedding, as one more objective.
- `plan`: a whole run as data: epochs, batch size, learning rates and their schedule.
  The rows, the noise and the rate of any update follow from it.
- `checkpoint`: a run on the disk, whole or not at all, every byte verified on reading.
- `history`: what a run recorded: its log, its best epoch, its table and its picture.
- `tracking`: who is told of a run: log, TensorBoard, W&B or an object of your own, progress bar.
- `same_data`: what a run learned from, part by part, so that it is not resumed with other data.
- `passes`: forward and backward over the batches of an update, so that parts are one whole.
- `update`: one optimiser step over several batches and processes, stopped before a NaN
  reaches the weights.
- `loop`: `fit` trains, validates, stops early, saves, and resumes as if nothing had happened;
  `evaluate_loss` looks at data without changing anything.
- `curriculum`: easy items first: scores of difficulty, pacing, and the sampler that uses them.
- `finetune`: pretrained encoders: rates by depth, layers that thaw by date, frozen norms,
  activations that are computed twice.
- `memory`: the memory of an update, predicted without computing it, or measured.

A module imports only from modules above it in this list, and from `mmemo.core`, `mmemo.data` and
`mmemo.models`.
- `catalogue`: the losses and trackers that come with mmemo, with their options.
"""
