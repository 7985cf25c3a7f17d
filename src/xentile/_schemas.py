"""The schemas of every operator of xentile, as data: setup.py reads them without torch.

Operators only fill outputs that Python allocates (out-variants): the cheapest form of a dispatcher call, and
torch.compile plans the memory. N rows, V columns, G groups, Q quantiles; acc = float32, or float64 for float64 logits.
`logits` is (N, V) with stride 1 in the last dimension and any row stride; vectors are contiguous.
"""

import hashlib

SCHEMAS = {
    # One launch: loss, statistics, the sketch, and the gradient when dlogits is given (not with reduction none).
    # loss: () for mean and sum, (N,) for none; denominator: () what the mean was divided by (1 otherwise).
    # row_max, sum_exp: m and S of each row. The gradient's p = exp(z - m) / S loses no digits; exp(z - lse) would.
    "cross_entropy": (
        "(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor? normalizer, Tensor? group_ids, "
        "Tensor(a!) loss, Tensor(b!) denominator, Tensor(c!) token_loss, Tensor(d!) lse, Tensor(e!) row_max, "
        "Tensor(f!) sum_exp, Tensor(g!) predicted, Tensor(h!) correct, Tensor(i!)? entropy, Tensor(j!)? target_rank, "
        "Tensor(k!)? sketch, Tensor(l!)? dlogits, "
        "int ignore_index, int reduction, float label_smoothing, float z_loss, float softcap, float logit_scale, "
        "bool zero_if_empty) -> ()"
    ),
    # The gradient alone, from what the forward saved. dloss: () for mean and sum, (N,) for none. filled: dlogits holds
    # the gradient for dloss = 1, so there is nothing to do if dloss is 1, which only the device knows.
    "cross_entropy_backward": (
        "(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor denominator, "
        "Tensor token_loss, Tensor row_max, Tensor sum_exp, Tensor(a!) dlogits, int ignore_index, int reduction, "
        "float label_smoothing, float z_loss, float softcap, float logit_scale, bool filled) -> ()"
    ),
    # A teacher's top K, as it comes, in one canonical form: sorted_ids (N, K) int32 strictly ascending up to the
    # sentinel num_classes, tempered log-masses sorted_logprobs (N, K), and of what is outside tail (N,); mass (N,).
    "topk_support": (
        "(Tensor ids, Tensor logprobs, Tensor? log_z, Tensor? tail_logprob, Tensor? token_temperature, "
        "Tensor(a!) sorted_ids, Tensor(b!) sorted_logprobs, Tensor(c!) tail, Tensor(d!) mass, "
        "int num_classes, int support, int duplicates, int fallback, float temperature) -> ()"
    ),
    # As cross_entropy, against that form. rest (N, 3): what a row sums outside the support and the target, for the
    # backward: the maximum of z, and the sums of exp relative to it at the temperature and at temperature 1.
    "topk_distillation": (
        "(Tensor logits, Tensor ids, Tensor logprobs, Tensor tail, Tensor? target, Tensor? token_weight, "
        "Tensor? normalizer, Tensor? token_temperature, Tensor? group_ids, "
        "Tensor(a!) loss, Tensor(b!) denominator, Tensor(c!) kd_loss, Tensor(d!) token_loss, Tensor(e!) student_mass, "
        "Tensor(f!) rest, Tensor(g!)? sketch, Tensor(h!)? kd_sketch, Tensor(i!)? dlogits, "
        "int ignore_index, int reduction, int support, int divergence, float beta, float temperature, "
        "bool temperature_squared, float kd_weight, float ce_weight, float softcap, float logit_scale, "
        "bool zero_if_empty) -> ()"
    ),
    "topk_distillation_backward": (
        "(Tensor dloss, Tensor logits, Tensor ids, Tensor logprobs, Tensor tail, Tensor? target, "
        "Tensor? token_weight, Tensor? token_temperature, Tensor denominator, Tensor token_loss, Tensor rest, "
        "Tensor(a!) dlogits, int ignore_index, int reduction, int support, int divergence, float beta, "
        "float temperature, bool temperature_squared, float kd_weight, float ce_weight, float softcap, "
        "float logit_scale, bool filled) -> ()"
    ),
    # Against a teacher's logits (N, V). rows (N, 6), for the backward: the student's maximum of z, its sums of exp at
    # the temperature and at temperature 1, the teacher's maximum and sum, and E (reference/distillation.py).
    "distillation": (
        "(Tensor logits, Tensor teacher_logits, Tensor? target, Tensor? token_weight, Tensor? normalizer, "
        "Tensor? token_temperature, Tensor? group_ids, "
        "Tensor(a!) loss, Tensor(b!) denominator, Tensor(c!) kd_loss, Tensor(d!) token_loss, Tensor(e!) rows, "
        "Tensor(f!)? sketch, Tensor(g!)? kd_sketch, Tensor(h!)? dlogits, "
        "int ignore_index, int reduction, int divergence, float beta, float temperature, "
        "bool temperature_squared, float kd_weight, float ce_weight, float softcap, float logit_scale, "
        "bool zero_if_empty) -> ()"
    ),
    "distillation_backward": (
        "(Tensor dloss, Tensor logits, Tensor teacher_logits, Tensor? target, Tensor? token_weight, "
        "Tensor? token_temperature, Tensor denominator, Tensor token_loss, Tensor rows, Tensor(a!) dlogits, "
        "int ignore_index, int reduction, int divergence, float beta, float temperature, "
        "bool temperature_squared, float kd_weight, float ce_weight, float softcap, float logit_scale, "
        "bool filled) -> ()"
    ),
    # Contiguous memory for the gradient, of the shape and dtype of logits. csrc/cpu keeps it when it is freed, for the
    # next gradient, while the system may take it; empty_cache gives it back at once.
    "empty_gradient": "(Tensor logits) -> Tensor",
    "empty_cache": "() -> ()",
    # x *= scale, scale () float32 or float64, without touching memory when scale is exactly 1. For a gradient in place.
    "scale_": "(Tensor(a!) x, Tensor scale) -> ()",
    # Adds values (N,) float32, where mask (N,) bool holds, to the sketch; each counts `unit`, or its weight in that
    # unit.
    "sketch_update": (
        "(Tensor values, Tensor? mask, Tensor? weights, Tensor? group_ids, Tensor(a!) sketch, int unit) -> ()"
    ),
    # q (Q,) float64 in [0, 1] -> estimate and the bounds that enclose the exact answer, each (G, Q) float32.
    "sketch_quantile": (
        "(Tensor sketch, Tensor q, Tensor(a!) value, Tensor(b!) lower, Tensor(c!) upper, int interpolation) -> ()"
    ),
    # One digit of a radix selection. Of the values of x (N,) where mask (N,) bool holds, those whose key, without its
    # last shift + bits bits, is prefixes[t] add 1, or their weight (N,) int64, to counts[t] (T, 2**bits) int64, in the
    # column that the next `bits` bits say. T = 1 where that leaves no prefix. Keys: reference/quantile.py.
    "radix_counts": (
        "(Tensor x, Tensor? mask, Tensor? weights, Tensor prefixes, int shift, int bits, Tensor(a!) counts) -> ()"
    ),
    # All of `quantile` in one call, for a CPU. The quantiles q (Q,) float64 of x, into value of the shape of q: float64
    # for float64 x, else float32. mask bool and weights float64 have the shape of x. counted (2,) int64: what counts
    # without NaN, in units of weights, and what is NaN; -1 where a weight is negative, infinite or NaN. Then, where
    # nothing counts, and for a NaN that is not omitted, every value is NaN. interpolation: reference/quantile.py.
    "host_quantile": (
        "(Tensor x, Tensor? mask, Tensor? weights, Tensor q, Tensor(a!) value, Tensor(b!) counted, int interpolation, "
        "bool omit_nan) -> ()"
    ),
    # The K largest of each row by (logit, then lowest id), and the rest's masses at temperatures (T,) float32: ids and
    # logprobs (N, K) int32 and float32, log_z and tail_logprob (N, T) float32. Meaning: reference/teacher.py.
    "teacher_topk": (
        "(Tensor logits, Tensor temperatures, Tensor(a!) ids, Tensor(b!) logprobs, Tensor(c!) log_z, "
        "Tensor(d!) tail_logprob, float softcap, float logit_scale) -> ()"
    ),
    # Index of the first target that is neither ignored nor in [0, V); -1 if there is none. Synchronises on a GPU.
    "first_bad_target": "(Tensor target, int num_classes, int ignore_index) -> int",
    "first_bad_group": "(Tensor group_ids, int num_groups) -> int",
    "isa": "() -> str",
}
WITHOUT_TENSORS = {"isa", "empty_cache"}
"""Operators that cannot be dispatched by device, and hence have one owner: csrc/cpu if it was built."""

SIGNATURE = "xentile schemas " + hashlib.sha256(repr(sorted(SCHEMAS.items())).encode()).hexdigest()[:16]
"""Compiled into csrc/cpu. A library with another one was built for other operators, and must not be called."""
