"""What everything else stands on: streams and batches, errors, files, state, style.

batch: values, mask and clock of a modality (`Stream`), items that share them (`Batch`);
    begin here, with `Stream.of`, `collate`, `masked_mean` and `align`.
rows: rows that somebody has chosen, checked (`row_numbers`);
    steps of a clip, chosen by the clock (`spread_steps`).
errors: the package's few types of error, `check_choice` with the nearest name,
    and checks of waveforms, frames and widths.
files: files that are whole or not there (`write_whole`);
    fingerprints of files and of tensors.
pieces: values as bytes, the library that code belongs to, the names that it looks up;
identity: what an object computes, as a key of every process alike (`fingerprint_object`).
state: seeds, random numbers that disturb nobody (`own_noise`), train and eval modes,
    the device, precision.
style: colours, axes without a box (`new_axes`), intervals, pictures of masks;
    `check_exercise`.
registry: one list for each kind of thing that people add (fusions, encoders, corpora ...);
    an entry says its class, its options and one line about it.
plugins: parts of your own, in a module that a recipe names.
"""
