"""Reading data of others: tables and files that may be wrong, corpora that are parsed once.

standards: names of columns and classes, splits and rates that all corpora share;
    `fill_unvoiced` mends columns that mean nothing.
tables: csv, parquet, npz and sound of unknown origin; an error names file and line,
    nothing runs.
arrow: a batch on disk without its padding (`to_arrow`), and rows of it (`ArrowColumns`);
    used by corpus.
corpus: begin here: `cached` parses a corpus once, and the `Corpus` answers `corpus[rows]`
    with a batch.
splits: rows for training and test that never part a speaker: `speaker_split`,
    `speaker_folds`, `check_split`.
meld, ravdess, cmu: readers of public corpora: `read_meld`, `read_ravdess`, `read_mmmo`,
    `read_mosi`.
interviews, daicwoz: the files of DAIC-WOZ one by one, and the corpus of them
    (`read_daicwoz`).
decoding, clips: a film or recording as far as it can be read (`decode_clip`), and folders
    of them (`read_clips`, `read_media`).
features: utterance features of other models, joined by id: `read_features`,
    `attach_features`.
"""
