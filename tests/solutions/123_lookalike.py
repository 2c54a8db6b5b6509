import torch

from mmemo.data.standards import fill_unvoiced


def answer_begins(transcript):
    "Second at which the answer's clock begins, from a transcript table."
    return float(transcript[transcript.value == "xxx"].start_time.iloc[0])


def read_covarep(path, begin):
    "Values [T, 74] float32 and mask [T] of a COVAREP file from second `begin` on."
    x = np.loadtxt(path, delimiter=",", dtype=np.float32)[round(begin * AUDIO_RATE) :]
    mask = x.any(1)
    x = fill_unvoiced(
        torch.from_numpy(x)[None], torch.from_numpy(x[:, 1] > 0)[None], torch.from_numpy(mask)[None]
    )[0].numpy()
    return np.where(mask[:, None], x, 0), mask


def binary_of(table):
    "The right PHQ8_Binary of each row of a train or dev table."
    return (table.PHQ8_Score >= 10).to_numpy(int)
