#include <cmath>
#include <limits>
#include <vector>

#include "contrastive_reward.h"

namespace fastcap {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// The texts of one image. A sum without one of its terms cancels only where that term is the largest: the sums here leave
// the largest out from the start, and what is subtracted from one that holds it is never more than it.
struct Group {
  double top = -kInf, second = -kInf;
  int64_t i_top = -1, i_second = -1, i_nan = -1, nans = 0;
  double rest = 0;         // sum of exp(s - top) without the largest
  double rest_second = 0;  // the same of exp(s - second)
  double flow = 0;         // backward: sum of dvalue exp(top - value) without the largest

  void add(double s, int64_t p) {
    if (s != s) {
      if (nans++ == 0) i_nan = p;
    } else if (s > top || i_top < 0) {
      second = top, i_second = i_top, top = s, i_top = p;
    } else if (s > second || i_second < 0) {
      second = s, i_second = p;
    }
  }
};

// exp(x - y), where both may be the same infinity
double relative(double x, double y) { return x == y ? 1.0 : std::exp(x - y); }

template <typename Acc>
std::vector<Group> groups_of(const Tensor& own, const Tensor& positive, int64_t Q) {
  std::vector<Group> groups(Q);
  const Acc* s = own.as<Acc>();
  const int64_t* q = positive.as<int64_t>();
  for (int64_t p = 0; p < own.sizes[0]; ++p)
    if (q[p] >= 0 && q[p] < Q) groups[q[p]].add(s[p], p);
  return groups;
}

template <typename Acc>
void forward(const OthersForward& args) {
  const int64_t P = args.own.sizes[0];
  const Acc* s = args.own.as<Acc>();
  const int64_t* q = args.positive.as<int64_t>();
  std::vector<Group> groups = groups_of<Acc>(args.own, args.positive, args.Q);
  const auto group_of = [&](int64_t p) { return q[p] >= 0 && q[p] < args.Q ? &groups[q[p]] : nullptr; };
  if (!args.index) {
    for (int64_t p = 0; p < P; ++p) {
      Group* g = group_of(p);
      if (!g || p == g->i_top || s[p] != s[p]) continue;
      g->rest += relative(s[p], g->top);
      g->rest_second += relative(s[p], g->second);
    }
  }
  for (int64_t p = 0; p < P; ++p) {
    const Group* g = group_of(p);
    double value = -kInf;
    int64_t index = -1;
    const bool is_nan = s[p] != s[p];
    if (g && g->nans > is_nan) {
      value = std::numeric_limits<double>::quiet_NaN();
      index = g->i_nan;  // p itself is NaN only where another is too: either stands for the others
    } else if (g && p == g->i_top) {
      index = g->i_second;
      if (index >= 0) value = args.index ? g->second : g->second + std::log(g->rest_second);
    } else if (g && g->i_top >= 0) {
      index = g->i_top;
      const double others = args.index ? 1.0 : 1.0 + g->rest - (is_nan ? 0.0 : relative(s[p], g->top));
      value = g->top + std::log(others);
    }
    args.value.as<Acc>()[p] = static_cast<Acc>(value);
    if (args.index) args.index.as<int64_t>()[p] = index;
  }
}

template <typename Acc>
void backward(const OthersBackward& args) {
  const int64_t P = args.own.sizes[0];
  const Acc *s = args.own.as<Acc>(), *value = args.value.as<Acc>(), *dvalue = args.dvalue.as<Acc>();
  const int64_t* q = args.positive.as<int64_t>();
  std::vector<Group> groups = groups_of<Acc>(args.own, args.positive, args.Q);
  const auto alone = [&](int64_t p) { return q[p] < 0 || q[p] >= args.Q || value[p] == -kInf; };
  const auto flow_of = [&](int64_t p, double x) { return dvalue[p] * relative(x, value[p]); };
  for (int64_t p = 0; p < P; ++p)
    if (!alone(p) && p != groups[q[p]].i_top) groups[q[p]].flow += flow_of(p, groups[q[p]].top);
  for (int64_t p = 0; p < P; ++p) {
    double down = 0;
    if (!alone(p)) {
      const Group& g = groups[q[p]];
      down = g.flow;
      if (p != g.i_top) {
        down = relative(s[p], g.top) * (g.flow - flow_of(p, g.top));
        if (g.i_top >= 0) down += flow_of(g.i_top, s[p]);
      }
    }
    args.down.as<Acc>()[p] = static_cast<Acc>(down);
  }
}

}  // namespace

void contrastive_reward_others_fwd_cpu(const OthersForward& args) {
  check_others(args);
  if (args.own.dtype == DType::kFloat64)
    forward<double>(args);
  else
    forward<float>(args);
}

void contrastive_reward_others_bwd_cpu(const OthersBackward& args) {
  check_others(args);
  if (args.own.dtype == DType::kFloat64)
    backward<double>(args);
  else
    backward<float>(args);
}

}  // namespace fastcap
