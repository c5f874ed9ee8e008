// The arithmetic of attention for one tile: the queries of a few tokens for all heads that share a KV head, as rows of
// one matrix, against the keys and values of that head, 64 keys at a time.
//
// Key tiles and splits lie at absolute positions, and a tile in which a row sees nothing leaves the row as it was to
// the bit; so a row's result does not depend on which rows it is computed with.
#pragma once

#include "plugins/attention/cache.h"
#include "plugins/attention/head.h"
#include "plugins/attention/softmax.h"
#include "plugins/tile.h"

namespace enginery::ENGINERY_ISA {

inline constexpr int64_t kKeyTile = 64;
inline constexpr int64_t kKeyGroups = kKeyTile / 16;
inline constexpr int64_t kSplitKeys = 512;
inline constexpr int kPanelsTogether = kLanes == 16 ? 4 : 2;

// A thread's working memory for one tile, cut from its scratch.
struct TileScratch {
    std::byte* queries;      // [rows][head_dim], float or bf16
    float* scores;           // [rows][kKeyTile]
    std::byte* weights;      // [rows][kKeyTile], float or bf16
    float* values;           // [rows][value_dim], sums of the current split
    float* total_values;     // [rows][value_dim]
    RowState* states;        // [rows]
    RowState* total_states;  // [rows]
    float* factors;          // [rows]
    std::byte* keys_bf16;    // [kKeyTile][head_dim], an int8 tile widened
    std::byte* values_bf16;  // [kKeyTile][value_dim]
    std::byte* last_pair;    // [value_dim][2], the last values where their number is odd
    float* head;             // [head_dim]
    float* key_scales;       // [kKeyTile]
    float* value_scales;     // [kKeyTile]

    // Cuts `scratch` up, if it is not null; returns the bytes needed.
    int64_t cut(std::byte* scratch, int64_t rows, int64_t head_dim, int64_t value_dim) {
        int64_t used = 0;
        const auto take = [&]<class T>(T*& part, int64_t bytes) {
            if (scratch != nullptr) part = reinterpret_cast<T*>(scratch + used);
            used += round_up(bytes, 64);
        };
        take(queries, rows * head_dim * 4);
        take(scores, rows * kKeyTile * 4);
        take(weights, rows * kKeyTile * 4);
        take(values, rows * value_dim * 4);
        take(total_values, rows * value_dim * 4);
        take(states, rows * int64_t{sizeof(RowState)});
        take(total_states, rows * int64_t{sizeof(RowState)});
        take(factors, rows * 4);
        take(keys_bf16, kKeyTile * head_dim * 2);
        take(values_bf16, kKeyTile * value_dim * 2);
        take(last_pair, value_dim * 4);
        take(head, head_dim * 4);
        take(key_scales, kKeyTile * 4);
        take(value_scales, kKeyTile * 4);
        return used;
    }
};

// The keys and values of one sequence and KV head.
struct Context {
    const LayerState* state;
    const HeadCache* cache;
    const int32_t* block_table;  // [blocks of the sequence]
    int64_t head;

    const std::byte* block_of(int64_t position) const {
        return state->data + block_table[position / cache->block_size] * state->block_bytes + head * state->head_bytes;
    }
};

// Rows are tokens x heads; visible: [rows / heads], what each token sees.
struct TileShape {
    int64_t rows, heads;
    const Visible* visible;
};

// Keys of a tile, by 16s: their panels, ready to multiply, or for int8 where they lie.
struct KeyTile {
    int64_t base = 0;                        // position of the first key looked at, a multiple of 16
    int64_t groups = 0;                      // of 16 keys
    int64_t count = 0;                       // keys that exist, from base on
    const std::byte* keys[kKeyGroups];       // a panel each
    const std::byte* values[kKeyGroups];     // the first panel of each
    const uint16_t* key_scales[kKeyGroups];  // of int8: of 16 keys, and of their values
    const uint16_t* value_scales[kKeyGroups];
};

// Position of the first tile of split number `split`, of keys from `first` on.
inline int64_t first_tile(int64_t split, int64_t first) {
    return std::max(split * kSplitKeys, first) / kKeyTile * kKeyTile;
}

// Finds the keys of the tile at `tile_base` that lie within first .. last.
static inline KeyTile find_keys(const Context& context, int64_t tile_base, int64_t first, int64_t last) {
    const HeadCache& cache = *context.cache;
    KeyTile tile;
    tile.base = std::max(tile_base, first / 16 * 16);
    const int64_t end = std::min(tile_base + kKeyTile, last + 1);
    tile.count = end - tile.base;
    tile.groups = (tile.count + 15) / 16;
    for (int64_t g = 0; g < tile.groups; ++g) {
        const int64_t position = tile.base + 16 * g;
        const int64_t offset = position % cache.block_size;
        const std::byte* block = context.block_of(position);
        tile.keys[g] = block + offset * cache.head_dim * cache.element_bytes;
        tile.values[g] = block + cache.values_begin() + offset * cache.value_dim * cache.element_bytes;
        if (cache.type != CacheType::kI8) continue;
        tile.key_scales[g] = cache.key_scales(block) + offset;
        tile.value_scales[g] = cache.value_scales(block) + offset;
    }
    return tile;
}

// Values and keys of int8 are the same whole numbers in bf16. `ahead` is as long as `from`, or null.
ENGINERY_INLINE void widen_bytes(const std::byte* from, std::byte* to, int64_t count, const std::byte* ahead) {
    for (int64_t i = 0; i < count; i += kLanes) {
        if (ahead != nullptr && i % 64 == 0) prefetch(ahead + i);
        store_bf16(reinterpret_cast<uint16_t*>(to) + i, load_i8(reinterpret_cast<const int8_t*>(from) + i));
    }
}

// A tile of int8, and its scales, in scratch. What lies in `next` comes near meanwhile.
static inline KeyTile widen_keys(const HeadCache& cache, const TileScratch& s, KeyTile tile, const KeyTile& next) {
    for (int64_t g = 0; g < tile.groups; ++g) {
        std::byte* keys = s.keys_bf16 + g * 16 * cache.head_dim * 2;
        std::byte* values = s.values_bf16 + g * 16 * cache.value_dim * 2;
        widen_bytes(tile.keys[g], keys, 16 * cache.head_dim, g < next.groups ? next.keys[g] : nullptr);
        widen_bytes(tile.values[g], values, 16 * cache.value_dim, g < next.groups ? next.values[g] : nullptr);
        tile.keys[g] = keys;
        tile.values[g] = values;
        for (int64_t i = 0; i < 16; i += kLanes) {
            store(s.key_scales + 16 * g + i, load_f16(tile.key_scales[g] + i));
            store(s.value_scales + 16 * g + i, load_f16(tile.value_scales[g] + i));
        }
    }
    return tile;
}

template <class Dot>
static void score_keys(const TileShape& shape, const HeadCache& cache, const TileScratch& s, const KeyTile& tile,
                       const KeyTile& next) {
    TileArguments t;
    Segment segment;
    t.activation_stride = cache.head_dim * 4 / cache.packed();
    t.segments = &segment;
    t.num_segments = 1;
    t.panel_step = kPanelStep;
    t.out_stride = kKeyTile;
    segment.steps = cache.head_dim / cache.packed();
    for (int64_t group = 0; group < tile.groups; group += kPanelsTogether) {
        const int panels = static_cast<int>(std::min<int64_t>(kPanelsTogether, tile.groups - group));
        for (int p = 0; p < panels; ++p) segment.panels[p] = tile.keys[group + p];
        t.num_ahead = 0;
        for (int64_t g = group; g < std::min(group + kPanelsTogether, next.groups); ++g) {
            t.ahead[t.num_ahead++] = next.keys[g];
        }
        t.activations = s.queries;
        t.out = s.scores + group * 16;
        multiply_rows<Dot, Finish::kStore>(t, shape.rows, panels);
    }
}

// Scores become weights in the type that values are multiplied in.
static inline void weigh_scores(const ScoreRule& rule, const TileShape& shape, const HeadCache& cache,
                                const TileScratch& s, const KeyTile& tile) {
    const int64_t count = tile.groups * 16;
    for (int64_t r = 0; r < shape.rows; ++r) {
        float* scores = s.scores + r * kKeyTile;
        s.factors[r] = softmax_step(rule, shape.visible[r / shape.heads], static_cast<int32_t>(tile.base), count,
                                    cache.type == CacheType::kI8 ? s.key_scales : nullptr, scores, s.states[r]);
        if (cache.type == CacheType::kF32) continue;
        auto* weights = reinterpret_cast<uint16_t*>(s.weights) + r * kKeyTile;
        for (int64_t i = 0; i < count; i += kLanes) {
            VecF weight = load(scores + i);
            // Slots that hold no key may hold any scale, NaN too.
            if (cache.type == CacheType::kI8)
                weight = select(less(zero(), weight), weight * load(s.value_scales + i), zero());
            store_bf16(weights + i, weight);
        }
    }
}

// Segments of values that lie one after another; of an odd last pair, a copy without what no key has written.
static inline int cut_values(const HeadCache& cache, const TileScratch& s, const KeyTile& tile, int64_t first_panel,
                             int panels, Segment* segments) {
    const int64_t step_bytes = cache.value_dim * 4;
    int num_segments = 0;
    const auto add = [&](const std::byte* values, int64_t steps) {
        Segment& segment = segments[num_segments++];
        for (int p = 0; p < panels; ++p) segment.panels[p] = values + (first_panel + p) * kPanelStep;
        segment.steps = steps;
    };
    for (int64_t g = 0; g < tile.groups; ++g) {
        const int64_t keys = std::min<int64_t>(16, tile.count - 16 * g);
        const int64_t whole_steps = keys / cache.packed();
        if (whole_steps > 0) add(tile.values[g], whole_steps);
        if (whole_steps * cache.packed() == keys) continue;
        const auto* pair = reinterpret_cast<const uint32_t*>(tile.values[g] + whole_steps * step_bytes);
        auto* copy = reinterpret_cast<uint32_t*>(s.last_pair);
        for (int64_t i = 0; i < cache.value_dim; ++i) copy[i] = pair[i] & 0xffffu;
        add(s.last_pair, 1);
    }
    return num_segments;
}

template <class Dot>
static void add_values(const TileShape& shape, const HeadCache& cache, const TileScratch& s, const KeyTile& tile,
                       const KeyTile& next) {
    TileArguments t;
    Segment segments[kKeyGroups + 1];
    t.activation_stride = kKeyTile * 4 / cache.packed();
    t.segments = segments;
    t.panel_step = cache.value_dim * 4;
    t.out_stride = cache.value_dim;
    const int64_t all_panels = cache.value_dim / 16;
    const int64_t group_bytes = 16 * cache.value_dim * cache.element_bytes;
    const int64_t part_bytes = group_bytes * kKeyGroups / all_panels;  // what a full tile brings of each that is ahead
    for (int64_t panel = 0; panel < all_panels; panel += kPanelsTogether) {
        const int panels = static_cast<int>(std::min<int64_t>(kPanelsTogether, all_panels - panel));
        t.num_segments = cut_values(cache, s, tile, panel, panels, segments);
        t.num_ahead = 0;
        for (int64_t part = panel; part < panel + panels; ++part) {
            const int64_t begin = part * part_bytes, group = begin / group_bytes;
            if (group < next.groups) t.ahead[t.num_ahead++] = next.values[group] + begin % group_bytes;
        }
        t.activations = cache.type == CacheType::kF32 ? reinterpret_cast<const std::byte*>(s.scores) : s.weights;
        t.out = s.values + panel * 16;
        t.factors = s.factors;
        multiply_rows<Dot, Finish::kScaleAdd>(t, shape.rows, panels);
    }
}

// Attends to the keys of split number `split` that lie within first .. last: states and values of `s`. Those of the
// next tile come near meanwhile, at the end those of `after`.
template <class Dot>
static void attend_split(const ScoreRule& rule, const TileShape& shape, const Context& context, const TileScratch& s,
                         int64_t split, int64_t first, int64_t last, const KeyTile& after) {
    const HeadCache& cache = *context.cache;
    for (int64_t r = 0; r < shape.rows; ++r) s.states[r] = RowState{};
    std::memset(s.values, 0, static_cast<size_t>(shape.rows * cache.value_dim) * sizeof(float));
    const int64_t begin = first_tile(split, first);
    const int64_t end = std::min((split + 1) * kSplitKeys, last + 1);
    KeyTile tile = find_keys(context, begin, first, last);
    for (int64_t base = begin; base < end; base += kKeyTile) {
        const KeyTile next = base + kKeyTile < end ? find_keys(context, base + kKeyTile, first, last) : after;
        const bool is_int8 = cache.type == CacheType::kI8;
        const KeyTile ready = is_int8 ? widen_keys(cache, s, tile, next) : tile;
        const KeyTile ahead = is_int8 ? KeyTile() : next;
        score_keys<Dot>(shape, cache, s, ready, ahead);
        weigh_scores(rule, shape, cache, s, ready);
        add_values<Dot>(shape, cache, s, ready, ahead);
        tile = next;
    }
}

}  // namespace enginery::ENGINERY_ISA
