def pearson_r(prediction, target):
    n, p, t = len(target), prediction.sum(), target.sum()
    spread = ((prediction**2).sum() - p * p / n) * ((target**2).sum() - t * t / n)
    return ((prediction * target).sum() - p * t / n) / spread**0.5 if spread > 1e-12 else 0.0


def design_effect(error, speakers):
    def width(who):
        return (lambda i: i.high - i.low)(score_intervals(error, 0 * error, who)["rmse"])

    return width(speakers) / width(np.arange(len(error)))


def brier(scores, target):
    return float(
        (scores - torch.nn.functional.one_hot(target, scores.shape[1])).square().sum(1).mean()
    )
