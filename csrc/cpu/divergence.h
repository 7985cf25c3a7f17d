// Divergences between a teacher's masses p and a student's q over some classes, term by term and without cancellation:
// what xentile/reference/divergence.py describes. Written once for any type of number: M, the mathematics of it, has
// `Number` and the functions that are called here. Without a header of the standard library: see kernels.h.
#pragma once

namespace xentile {

enum DivergenceCode { kForwardKl, kReverseKl, kJsd, kSkewForwardKl, kSkewReverseKl, kTotalVariation };

// share: of the teacher in the mixture M = share p + (1 - share) q that Jensen-Shannon and the skew divergences have.
// closed: p and q each sum to 1 over the classes, so terms that cancel in the sum make each f nonnegative.
struct DivergenceTask {
  DivergenceCode code;
  double share, log_share, log_rest;  // log share, log(1 - share)
  bool closed;
};

// f_c, and G_c = q_c df_c/dq_c up to what cancels in G_c - q_c sum(G) if the classes are closed.
template <class R>
struct DivergenceTerm {
  R value, slope;
};

// Of one class, from the masses and their logarithms. An infinite f is one: p > 0 = q in the forward KL divergence.
template <class M>
class Divergence {
 public:
  typedef typename M::Number R;
  typedef DivergenceTerm<R> Term;

  static Term forward_kl(R log_p, R log_q, R p, R q, bool closed) {
    return {closed ? M::bregman(log_p, log_q, p, q) : M::times(p, log_p - log_q), -p};
  }

  static Term reverse_kl(R log_p, R log_q, R p, R q, bool closed) {
    const R expected = M::times(q, log_q - log_p);
    return {closed ? M::bregman(log_q, log_p, q, p) : expected, closed ? expected : expected + q};
  }

  static Term jsd(const DivergenceTask& task, R log_p, R log_q, R p, R q) {
    const R log_m = mixture(task, log_p, log_q), m = M::exp(log_m);
    const R share = M::number(task.share), rest = M::number(1 - task.share);
    return {share * M::bregman(log_p, log_m, p, m) + rest * M::bregman(log_q, log_m, q, m),
            rest * M::times(q, log_q - log_m)};
  }

  static Term skew_forward_kl(const DivergenceTask& task, R log_p, R log_q, R p, R q) {
    const R log_m = mixture(task, log_p, log_q);
    return {task.closed ? M::bregman(log_p, log_m, p, M::exp(log_m)) : M::times(p, log_p - log_m),
            M::number(task.share - 1) * overlap(task, log_p, log_q, log_m, p, q)};
  }

  static Term skew_reverse_kl(const DivergenceTask& task, R log_p, R log_q, R p, R q) {
    const R log_m = mixture(task, log_p, log_q), expected = M::times(q, log_q - log_m);
    return {task.closed ? M::bregman(log_q, log_m, q, M::exp(log_m)) : expected,
            expected + M::number(task.share) * overlap(task, log_p, log_q, log_m, p, q)};
  }

  // The difference from the ratio: p - q has no digits left where they are nearly equal.
  static Term total_variation(R log_p, R log_q, R p, R q) {
    const R ratio = M::abs(log_q - log_p), half = M::number(0.5);
    return {-half * M::times(M::larger(p, q), M::expm1(-ratio)), half * M::signed_as(q, log_q - log_p)};
  }

  static Term term(const DivergenceTask& task, R log_p, R log_q, R p, R q) {
    switch (task.code) {
      case kForwardKl:
        return forward_kl(log_p, log_q, p, q, task.closed);
      case kReverseKl:
        return reverse_kl(log_p, log_q, p, q, task.closed);
      case kJsd:
        return jsd(task, log_p, log_q, p, q);
      case kSkewForwardKl:
        return skew_forward_kl(task, log_p, log_q, p, q);
      case kSkewReverseKl:
        return skew_reverse_kl(task, log_p, log_q, p, q);
      case kTotalVariation:
        break;
    }
    return total_variation(log_p, log_q, p, q);
  }

 private:
  static R mixture(const DivergenceTask& task, R log_p, R log_q) {
    return M::logaddexp(log_p + M::number(task.log_share), log_q + M::number(task.log_rest));
  }

  // p q / M, also where the mixture is one of them and that one is 0
  static R overlap(const DivergenceTask& task, R log_p, R log_q, R log_m, R p, R q) {
    if (task.share == 0) return p;
    if (task.share == 1) return q;
    return M::exp(log_p + log_q - log_m);
  }
};

}  // namespace xentile
