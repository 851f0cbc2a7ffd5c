import torch

from blip.losses import (
    Candidates,
    KeyedSampler,
    argmax_sampler,
    hard_negatives,
    itc_loss,
    itm_loss,
    lm_loss,
    same_picture,
    similarity,
    smoothed_targets,
)


def features(rows: int, queries: int | None = None) -> torch.Tensor:
    shape = (rows, 8) if queries is None else (rows, queries, 8)
    return torch.nn.functional.normalize(torch.randn(shape, dtype=torch.double), dim=-1)


def test_itc_loss_is_the_plain_double_loop() -> None:
    torch.manual_seed(0)
    image_feats, text_feats, temp = features(5, 3), features(5), torch.tensor(0.07, dtype=torch.double)
    rows = [torch.stack([(queries @ text).max() for text in text_feats]) for queries in image_feats]
    best = torch.stack(rows)
    sim = best / temp
    expected = -(sim.log_softmax(1).diag().mean() + sim.log_softmax(0).diag().mean()) / 2
    itself = Candidates(image_feats, text_feats, torch.eye(5), torch.eye(5))
    torch.testing.assert_close(itc_loss(image_feats, text_feats, itself, temp).loss, expected)


def test_candidates_of_their_own_give_the_same_loss_as_copies() -> None:
    torch.manual_seed(0)
    image_feats, text_feats, temp = features(4, 2), features(4), torch.tensor(0.1, dtype=torch.double)
    itself = Candidates(image_feats, text_feats, torch.eye(4), torch.eye(4))
    copies = Candidates(image_feats.clone(), text_feats.clone(), torch.eye(4), torch.eye(4))
    a, b = itc_loss(image_feats, text_feats, itself, temp), itc_loss(image_feats, text_feats, copies, temp)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.sim_t2i, b.sim_t2i)


def test_one_positive_per_row_is_usual_label_smoothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6, dtype=torch.double)
    rows = torch.tensor([3, 0, 5, 1])
    target = smoothed_targets(same_picture(rows, 6, None, None), 0.1, torch.double)
    expected = torch.nn.functional.cross_entropy(logits, rows, label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, target), expected)


def test_repeated_pictures_share_the_target() -> None:
    ids = torch.tensor([7, 8, 7])
    target = smoothed_targets(same_picture(torch.arange(3), 3, ids, ids), 0.0)
    assert target.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]


def test_similarity_in_half_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    image_feats, text_feats = features(3, 2).bfloat16(), features(4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = similarity(image_feats, text_feats)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, similarity(image_feats.float(), text_feats.float()))


def test_a_positive_is_never_drawn() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([0, 0, 1, 2, 2, 2])
    positive = same_picture(torch.arange(6), 6, ids, ids)
    sim = 50 * positive.double() + torch.randn(6, 6)
    for step in range(50):
        index = hard_negatives(sim, positive, torch.arange(6), KeyedSampler(0, step), "image")
        assert not positive.gather(1, index[:, None]).any()


def test_a_batch_of_one_picture_has_no_negative_and_does_not_fail() -> None:
    positive = torch.ones(3, 3, dtype=torch.bool)
    index = hard_negatives(torch.randn(3, 3), positive, torch.arange(3), KeyedSampler(0, 0), "text")
    assert index.shape == (3,)
    assert int(index.max()) < 3


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).expand(20000, 4)
    index = KeyedSampler(1, 2)(weights, torch.arange(20000), "image")
    share = torch.bincount(index, minlength=4) / 20000
    torch.testing.assert_close(share, weights[0], atol=0.012, rtol=0)
    assert share[1] == 0


def test_a_draw_is_a_function_of_seed_step_stream_and_row() -> None:
    weights = torch.rand(64, 40)
    whole = KeyedSampler(3, 9)(weights, torch.arange(64), "text")
    part = KeyedSampler(3, 9)(weights[40:], torch.arange(40, 64), "text")
    assert torch.equal(whole[40:], part)
    for seed, step in ((4, 9), (3, 8)):
        assert not torch.equal(whole, KeyedSampler(seed, step)(weights, torch.arange(64), "text"))
    assert not torch.equal(whole, KeyedSampler(3, 9)(weights, torch.arange(64), "image"))


def test_argmax_sampler_takes_the_hardest() -> None:
    sim = torch.tensor([[9.0, 1.0, 3.0], [5.0, 9.0, 2.0]])
    positive = same_picture(torch.arange(2), 3, None, None)
    assert hard_negatives(sim, positive, torch.arange(2), argmax_sampler, "image").tolist() == [2, 0]


def test_pairs_of_weight_zero_do_not_count_in_the_itm_loss() -> None:
    logits, labels = torch.randn(4, 2), torch.tensor([1, 0, 0, 1])
    weight = torch.tensor([1.0, 0, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(itm_loss(logits, labels, weight, 2.0), expected)


def test_lm_loss_is_smoothed_cross_entropy_over_targets() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 11), torch.tensor([3, -100, 0, 10, -100])
    expected = torch.nn.functional.cross_entropy(logits[[0, 2, 3]], labels[[0, 2, 3]], label_smoothing=0.1)
    torch.testing.assert_close(lm_loss(logits, labels), expected)
