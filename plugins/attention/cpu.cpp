// attention over the paged state: out [M, num_heads * head_dim].
//
// A unit of work is (tile of queries, KV head), and where units are too few for the threads (tile, KV head, split of
// the context). A context is always summed in splits of kSplitKeys and these combined in order, whether one thread goes
// through them or many do (Dao et al., Flash-Decoding, 2023): the last to finish a unit's splits combines them.
#include <vector>

#include "plugins/attention/query_tile.h"
#include "plugins/operators.h"
#include "plugins/share.h"

namespace enginery::ENGINERY_ISA {

namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kMostTileTokens = kTileRows;
constexpr int64_t kUnitsPerThread = 4;  // with fewer, contexts are split

// Consecutive rows (of M) of one sequence, and the keys that they see.
struct QueryTile {
    int64_t begin = 0, end = 0;
    int32_t sequence = 0;
    int64_t first_key = 0, last_key = -1;

    int64_t first_split() const { return first_key / kSplitKeys; }
    int64_t num_splits() const { return last_key / kSplitKeys - first_split() + 1; }
};

// What a thread does at a time: a tile and a KV head, all of the context or one of several splits of it.
struct Unit {
    QueryTile tile;
    int64_t head = 0, split = 0, splits = 1;
    int64_t pair = 0;        // its number among all (tile, KV head) pairs
    int64_t first_slot = 0;  // of the pair's rows of partial results
};

class Attention : public Kernel {
  public:
    Domain domain = Domain::kTokens;
    HeadTransform query_transform;
    HeadCache cache;
    LayerState state;
    ScoreRule rule;
    BoundOperand q, cos, sin, out;
    int64_t num_heads = 0, num_kv_heads = 0, heads_together = 0, tile_tokens = 0;
    int64_t window = 0, q_offset = 0, stride = 0;
    std::vector<std::atomic<int32_t>> splits_done;  // of the units of a split step; zero between steps

    bool wants_shared_scratch() const override { return true; }

    void run(const Step& step, const Team& team) override {
        Units units(*this, step, team);
        Unit unit, next;
        for (bool more = units.take(unit); more; unit = next) {
            more = units.take(next);
            KeyTile after;
            if (more) first_keys(step, next, after);
            if (unit.splits == 1) {
                run_whole(step, team, unit, after);
            } else {
                run_split(step, team, unit, after);
            }
        }
    }

  private:
    // All units in their order, of which each thread takes the next that nobody has.
    class Units {
      public:
        Units(const Attention& attention, const Step& step, const Team& team)
            : attention_(attention),
              step_(step),
              counter_(*team.counter),
              in_splits_(attention.choose_splits(step, team)) {}

        // Whether there is one.
        bool take(Unit& unit) {
            const int64_t number = counter_.fetch_add(1, std::memory_order_relaxed), heads = attention_.num_kv_heads;
            while (number >= end_) {
                pairs_ += (end_ - begin_) / splits_;
                slots_ += (end_ - begin_) * attention_.rows_of(tile_);
                if (!attention_.next_tile(step_, tile_)) return false;
                splits_ = in_splits_ ? tile_.num_splits() : 1;
                begin_ = end_;
                end_ += heads * splits_;
            }
            const int64_t head = (number - begin_) / splits_, split = (number - begin_) % splits_;
            const int64_t rows = attention_.rows_of(tile_);
            unit = {tile_, head, split, splits_, pairs_ + head, slots_ + head * splits_ * rows};
            return true;
        }

      private:
        const Attention& attention_;
        const Step& step_;
        std::atomic<int64_t>& counter_;
        bool in_splits_;
        // The tile of the last that was taken, its units' numbers, and how many pairs and slots the tiles before had.
        QueryTile tile_;
        int64_t splits_ = 1, begin_ = 0, end_ = 0, pairs_ = 0, slots_ = 0;
    };

    int64_t token_of(const Step& step, int64_t row) const { return domain == Domain::kTokens ? row : step.rows[row]; }

    bool next_tile(const Step& step, QueryTile& tile) const {
        const int64_t rows = domain_size(domain, step);
        tile.begin = tile.end;
        if (tile.begin >= rows) return false;
        const int64_t first_token = token_of(step, tile.begin);
        tile.sequence = step.token_sequence[first_token];
        tile.first_key = first_key_of(step.positions[first_token]);
        while (tile.end < rows && tile.end - tile.begin < tile_tokens) {
            const int64_t token = token_of(step, tile.end);
            if (step.token_sequence[token] != tile.sequence) break;
            tile.last_key = step.positions[token];
            ++tile.end;
        }
        return true;
    }

    int64_t first_key_of(int64_t position) const {
        return window == 0 ? 0 : std::max<int64_t>(0, position - window + 1);
    }

    // Whether this step's contexts are divided over threads: if units are few, and partial results have room.
    bool choose_splits(const Step& step, const Team& team) const {
        if (team.num_threads == 1) return false;
        int64_t units = 0, rows = 0, most_splits = 1;
        for (QueryTile tile; next_tile(step, tile);) {
            units += num_kv_heads;
            if (units >= kUnitsPerThread * team.num_threads) return false;
            rows += num_kv_heads * tile.num_splits() * rows_of(tile);
            most_splits = std::max(most_splits, tile.num_splits());
        }
        return most_splits > 1 && rows * partial_row_bytes() <= team.shared_scratch_bytes;
    }

    int64_t rows_of(const QueryTile& tile) const { return (tile.end - tile.begin) * heads_together; }
    int64_t tile_rows() const { return tile_tokens * heads_together; }
    // Of one row of partial results: its sums of values, and its state.
    int64_t partial_row_bytes() const { return cache.value_dim * 4 + int64_t{sizeof(RowState)}; }

    TileScratch prepare(const Step& step, const Team& team, const QueryTile& tile, int64_t head,
                        Visible* visible) const {
        TileScratch s;
        s.cut(team.scratch, tile_rows(), cache.head_dim, cache.value_dim);
        for (int64_t row = tile.begin; row < tile.end; ++row) {
            const int64_t token = token_of(step, row);
            const int64_t position = step.positions[token];
            visible[row - tile.begin] = {static_cast<int32_t>(first_key_of(position)), static_cast<int32_t>(position)};
            for (int64_t h = 0; h < heads_together; ++h) {
                const float* from =
                    q.at<const float>(team) + row * stride + q_offset + (head * heads_together + h) * cache.head_dim;
                transform_head(query_transform, from, cos.at<const float>(team) + token * query_transform.half,
                               sin.at<const float>(team) + token * query_transform.half, s.head);
                store_query(cache, s, (row - tile.begin) * heads_together + h, s.head);
            }
        }
        return s;
    }

    Context context_of(const Step& step, const QueryTile& tile, int64_t head) const {
        const GroupStep& group = step.groups[static_cast<size_t>(state.group)];
        return {&state, &cache, group.block_table + int64_t{tile.sequence} * group.max_blocks, head};
    }

    void keys_at(const Step& step, const QueryTile& tile, int64_t head, int64_t split, KeyTile& keys) const {
        find_keys(context_of(step, tile, head), first_tile(split, tile.first_key), tile.first_key, tile.last_key, keys);
    }

    void first_keys(const Step& step, const Unit& unit, KeyTile& keys) const {
        keys_at(step, unit.tile, unit.head, unit.tile.first_split() + unit.split, keys);
    }

    void attend(const Step& step, const TileScratch& s, const QueryTile& tile, const Visible* visible, int64_t head,
                int64_t split, const KeyTile& after) const {
        const Context context = context_of(step, tile, head);
        const TileShape shape{rows_of(tile), heads_together, visible};
        switch (cache.type) {
            case CacheType::kF32:
                return attend_split<DotF32>(rule, shape, context, s, split, tile.first_key, tile.last_key, after);
            case CacheType::kBf16:
                return attend_split<DotBf16>(rule, shape, context, s, split, tile.first_key, tile.last_key, after);
            case CacheType::kI8:
                return attend_split<DotS16>(rule, shape, context, s, split, tile.first_key, tile.last_key, after);
        }
    }

    void run_whole(const Step& step, const Team& team, const Unit& unit, const KeyTile& after) const {
        Visible visible[kMostTileTokens];
        const QueryTile& tile = unit.tile;
        const TileScratch s = prepare(step, team, tile, unit.head, visible);
        const int64_t first = tile.first_split(), splits = tile.num_splits();
        KeyTile next;
        for (int64_t split = 0; split < splits; ++split) {
            const bool more = split + 1 < splits;
            if (more) keys_at(step, tile, unit.head, first + split + 1, next);
            attend(step, s, tile, visible, unit.head, first + split, more ? next : after);
            combine(s, rows_of(tile), split, s.states, s.values);
        }
        write_out(team, s, tile, unit.head);
    }

    // The first split is taken as it is, the others are added to it.
    void combine(const TileScratch& s, int64_t rows, int64_t split, const RowState* states, const float* values) const {
        const int64_t value_dim = cache.value_dim;
        if (split == 0) {
            std::memcpy(s.total_states, states, static_cast<size_t>(rows) * sizeof(RowState));
            std::memcpy(s.total_values, values, static_cast<size_t>(rows * value_dim) * sizeof(float));
            return;
        }
        for (int64_t r = 0; r < rows; ++r) {
            merge_split(s.total_states[r], s.total_values + r * value_dim, states[r], values + r * value_dim,
                        value_dim);
        }
    }

    void run_split(const Step& step, const Team& team, const Unit& unit, const KeyTile& after) {
        Visible visible[kMostTileTokens];
        const QueryTile& tile = unit.tile;
        const TileScratch s = prepare(step, team, tile, unit.head, visible);
        const int64_t rows = rows_of(tile);
        const auto slot_values = [&](int64_t split) {
            return reinterpret_cast<float*>(team.shared_scratch +
                                            (unit.first_slot + split * rows) * partial_row_bytes());
        };
        const auto slot_states = [&](int64_t split) {
            return reinterpret_cast<RowState*>(slot_values(split) + rows * cache.value_dim);
        };
        attend(step, s, tile, visible, unit.head, tile.first_split() + unit.split, after);
        std::memcpy(slot_values(unit.split), s.values, static_cast<size_t>(rows * cache.value_dim) * sizeof(float));
        std::memcpy(slot_states(unit.split), s.states, static_cast<size_t>(rows) * sizeof(RowState));
        std::atomic<int32_t>& done = splits_done[static_cast<size_t>(unit.pair)];
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < unit.splits) return;
        done.store(0, std::memory_order_relaxed);
        for (int64_t split = 0; split < unit.splits; ++split) {
            combine(s, rows, split, slot_states(split), slot_values(split));
        }
        write_out(team, s, tile, unit.head);
    }

    void write_out(const Team& team, const TileScratch& s, const QueryTile& tile, int64_t head) const {
        const int64_t d = cache.head_dim;
        for (int64_t row = tile.begin; row < tile.end; ++row) {
            if (head == 0) zero_padding(out.at<float>(team) + row * row_stride(num_heads * d), num_heads * d);
            for (int64_t h = 0; h < heads_together; ++h) {
                const int64_t r = (row - tile.begin) * heads_together + h;
                float* to = out.at<float>(team) + row * row_stride(num_heads * d) + (head * heads_together + h) * d;
                const VecF sum = set1(s.total_states[r].sum);
                for (int64_t i = 0; i < d; i += kLanes) {
                    const int count = lanes_left(d, i);
                    store_part(to + i, load_part(s.total_values + r * cache.value_dim + i, count) / sum, count);
                }
            }
        }
    }
};

}  // namespace

std::unique_ptr<Kernel> make_attention(const CallSpec& call, const Binding& binding) {
    CallReader reader(call, binding);
    auto kernel = std::make_unique<Attention>();
    kernel->domain = reader.domain();
    const int64_t d = reader.integer("head_dim", 8, kMostHeadDim);
    if (d % 8 != 0) reader.fault("attribute head_dim: wanted a multiple of 8, got " + std::to_string(d));
    kernel->num_heads = reader.integer("num_heads", 1, 1 << 16);
    kernel->num_kv_heads = reader.integer("num_kv_heads", 1, 1 << 16);
    if (kernel->num_heads % kernel->num_kv_heads != 0) reader.fault("num_heads is not a multiple of num_kv_heads");
    kernel->heads_together = std::max<int64_t>(1, kernel->num_heads / kernel->num_kv_heads);
    kernel->tile_tokens = std::max<int64_t>(1, kTileRows / kernel->heads_together);
    const int64_t rot_dim = reader.integer("rot_dim", 0, d);
    if (rot_dim % 2 != 0) reader.fault("attribute rot_dim: wanted an even number, got " + std::to_string(rot_dim));
    kernel->rule.scale = static_cast<float>(reader.number("scale", -1e6, 1e6));
    kernel->rule.softcap = static_cast<float>(reader.number("softcap", 0.0, 1e30));
    kernel->window = reader.integer("window", 0, INT32_MAX);
    kernel->stride = reader.integer("stride", 1, kLargestColumns);
    kernel->q_offset = reader.integer("q_offset", 0, kLargestColumns);
    const int64_t columns = kernel->num_heads * d;
    if (kernel->q_offset + columns > kernel->stride) {
        reader.fault("attribute q_offset: " + std::to_string(columns) + " columns from there on leave a row of " +
                     std::to_string(kernel->stride));
    }
    const int64_t most = reader.largest(kernel->domain), tokens = reader.largest(Domain::kTokens);
    reader.input("block_table");
    reader.input("positions");
    reader.optional_input("token_sequence");
    if (kernel->domain == Domain::kRows) {
        reader.input("rows");
    } else {
        reader.optional_input("rows");
    }
    kernel->q = reader.required("q", {"f32"}, most * kernel->stride * 4);
    if (rot_dim > 0 || reader.has("cos")) kernel->cos = reader.required("cos", {"f32"}, tokens * rot_dim / 2 * 4);
    if (rot_dim > 0 || reader.has("sin")) kernel->sin = reader.required("sin", {"f32"}, tokens * rot_dim / 2 * 4);
    kernel->out = reader.required("out", {"f32"}, most * row_stride(columns) * 4);
    if (kernel->out.per_thread()) reader.fault("operand out: threads divide its heads, so it cannot be per thread");
    reader.refuse_overlap("q", most * kernel->stride * 4, "out", most * row_stride(columns) * 4);
    kernel->query_transform.head_dim = d;
    kernel->query_transform.half = rot_dim / 2;
    kernel->query_transform.eps = static_cast<float>(reader.number("eps", 0.0, 1.0));
    kernel->query_transform.norm =
        reinterpret_cast<const float*>(reader.optional("q_norm", {"rows_f32.v0"}, d * 4).data);
    kernel->state = reader.state("state", kernel->num_kv_heads, d);
    const int64_t kept = kernel->state.window;
    if (kept > 0 && (kernel->window == 0 || kernel->window > kept)) {
        reader.fault("attribute window: its state keeps " + std::to_string(kept) + " tokens, but " +
                     (kernel->window == 0 ? "all" : std::to_string(kernel->window)) + " are to be seen");
    }
    kernel->cache = HeadCache::of(kernel->state, d);
    if (TileScratch().cut(nullptr, kernel->tile_tokens * kernel->heads_together, d, round_up(d, 16)) >
        kThreadScratchBytes) {
        reader.fault(std::to_string(kernel->heads_together) + " heads of " + std::to_string(d) +
                     " that share a KV head do not fit a thread's scratch");
    }
    reader.finish();
    kernel->splits_done =
        std::vector<std::atomic<int32_t>>(static_cast<size_t>(kUnitsPerThread * std::max(1, binding.num_threads)));
    return kernel;
}

}  // namespace enginery::ENGINERY_ISA
