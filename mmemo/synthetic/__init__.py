"""Data whose causes are known: the best possible score of any model on them can be computed.

factors: the eight factors of a label, and the best possible score of a model that hears
    some of them (`ceiling`).
known_answer: begin here: `known_answer(n, seed, knobs)` makes interview answers, their
    words and their labels.
signals: voice and face columns with a factor's evidence in them;
    used by known_answer.
face: 68 points that action units move, and a drawing of them;
    used by render.
render: see and hear an item: `render_audio`, `render_frames`, `draw_item`,
    and a board of switches.
media: items as a camera and a microphone would have them (`render_media`), kept on disk
    (`render_kept`).
sessions, lookalike: items laid out as DAIC-WOZ or MELD lie on a disk, errors included:
    `write_daicwoz`, `write_meld`.
"""
