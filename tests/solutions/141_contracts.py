@torch.no_grad()
def influence(model, batch):
    with own_modes(model):
        model.eval()

        def said(b):
            return torch.cat([p.reshape(len(b), -1) for p in model(b).predictions.values()], 1)

        before, columns = said(batch), []
        for j in range(len(batch)):
            twice = torch.ones(len(batch))
            twice[j] = 2
            after = said(
                batch.replace(
                    **{
                        n: s.with_x(s.x * twice.view(-1, *[1] * (s.x.ndim - 1)))
                        for n, s in batch.streams.items()
                    }
                )
            )
            columns.append((after - before).abs().amax(1) > 1e-4)
    return torch.stack(columns, 1)


@torch.no_grad()
def clock_shift(encode, stream):
    out = encode(stream)
    both = stream.mask.any(1) & out.mask.any(1)
    return torch.where(
        both, (masked_mean(out.t, out.mask) - masked_mean(stream.t, stream.mask)).abs(), 0
    )


@torch.no_grad()
def order_matters(fuse, streams):
    turned = {n: streams[n] for n in sorted(streams, reverse=True)}
    if list(turned) == list(streams):
        turned = dict(reversed(turned.items()))
    return float((fuse(turned).vector - fuse(streams).vector).abs().max())
