// The arithmetic of attention for one tile: the queries of a few tokens for all heads that share a KV head, as rows of
// one matrix, against the keys and values of that head, 64 keys at a time.
//
// Key tiles and splits lie at absolute positions, and a tile in which a row sees nothing leaves the row as it was to
// the bit; so a row's result does not depend on which rows it is computed with, while the values of all are finite.
#pragma once

#include "plugins/attention/cache.h"
#include "plugins/attention/head.h"
#include "plugins/attention/softmax.h"
#include "plugins/tile.h"

namespace enginery::ENGINERY_ISA {

inline constexpr int64_t kKeyGroups = kKeyTile / 16;
inline constexpr int64_t kSplitKeys = 512;
// So that the rows of a decoding sequence fit the registers of AVX-512 at once.
inline constexpr int kPanelsTogether = 2;

// A thread's working memory for one tile, cut from its scratch.
struct TileScratch {
    std::byte* queries;      // [rows][head_dim], float, bf16 or int16
    float* query_scales;     // [rows], of int16
    float* scores;           // [rows][kKeyTile], of float the weights too
    std::byte* weights;      // [rows][kKeyTile], bf16 or int16
    float* weight_scales;    // [rows], of int16
    float* values;           // [rows][value_dim], sums of the current split
    float* total_values;     // [rows][value_dim]
    RowState* states;        // [rows]
    RowState* total_states;  // [rows]
    float* factors;          // [rows]
    std::byte* last_pair;    // [value_dim][2], bf16: the last values where their number is odd
    float* head;             // [head_dim]
    float* key_scales;       // [kKeyTile], of int8
    float* value_scales;     // [kKeyTile]

    // Cuts `scratch` up, if it is not null; returns the bytes needed.
    int64_t cut(std::byte* scratch, int64_t rows, int64_t head_dim, int64_t value_dim) {
        int64_t used = 0;
        const auto take = [&]<class T>(T*& part, int64_t bytes) {
            if (scratch != nullptr) part = reinterpret_cast<T*>(scratch + used);
            used += round_up(bytes, 64);
        };
        take(queries, rows * head_dim * 4);
        take(query_scales, rows * 4);
        take(scores, rows * kKeyTile * 4);
        take(weights, rows * kKeyTile * 2);
        take(weight_scales, rows * 4);
        take(values, rows * value_dim * 4);
        take(total_values, rows * value_dim * 4);
        take(states, rows * int64_t{sizeof(RowState)});
        take(total_states, rows * int64_t{sizeof(RowState)});
        take(factors, rows * 4);
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

    const std::byte* block(int64_t index) const {
        return state->data + block_table[index] * state->block_bytes + head * state->head_bytes;
    }
};

// Rows are tokens x heads; visible: [rows / heads], what each token sees.
struct TileShape {
    int64_t rows, heads;
    const Visible* visible;
};

// Keys of a tile, by 16s, where they lie.
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
static inline void find_keys(const Context& context, int64_t tile_base, int64_t first, int64_t last, KeyTile& tile) {
    const HeadCache& cache = *context.cache;
    tile.base = std::max(tile_base, first / 16 * 16);
    tile.count = std::min(tile_base + kKeyTile, last + 1) - tile.base;
    tile.groups = (tile.count + 15) / 16;
    int64_t index = tile.base / cache.block_size, offset = tile.base % cache.block_size;
    const std::byte* block = context.block(index);
    for (int64_t g = 0; g < tile.groups; ++g, offset += 16) {
        if (offset == cache.block_size) {
            block = context.block(++index);
            offset = 0;
        }
        tile.keys[g] = block + offset * cache.head_dim * cache.element_bytes;
        tile.values[g] = block + cache.values_begin() + offset * cache.value_dim * cache.element_bytes;
        if (cache.type != CacheType::kI8) continue;
        tile.key_scales[g] = cache.key_scales(block) + offset;
        tile.value_scales[g] = cache.value_scales(block) + offset;
    }
}

// The scales of an int8 tile in scratch, as floats.
static inline void widen_scales(const TileScratch& s, const KeyTile& tile) {
    for (int64_t g = 0; g < tile.groups; ++g) {
        for (int64_t i = 0; i < 16; i += kLanes) {
            store(s.key_scales + 16 * g + i, load_f16(tile.key_scales[g] + i));
            store(s.value_scales + 16 * g + i, load_f16(tile.value_scales[g] + i));
        }
    }
}

// A row's vectors as int16, of which 32767 is its greatest magnitude. Returns what one is worth.
ENGINERY_INLINE float store_whole(int16_t* to, const VecF* vectors, int64_t count) {
    constexpr float kMost = 32767.0f, kLeast = 1e-30f;  // less is nothing: kMost / most is finite
    VecF largest = zero();
    for (int64_t i = 0; i < count; i += kLanes) largest = max(abs(vectors[i / kLanes]), largest);
    const float most = max_lanes(largest);
    const VecF factor = set1(most > kLeast ? kMost / most : 0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
        store_i16_part(to + i, to_int(vectors[i / kLanes] * factor), lanes_left(count, i));
    }
    return most / kMost;
}

// A query of head_dim floats, in the type that it multiplies keys in.
static inline void store_query(const HeadCache& cache, const TileScratch& s, int64_t row, const float* query) {
    const int64_t d = cache.head_dim;
    VecF v[kMostHeadDim / kLanes];
    for (int64_t i = 0; i < d; i += kLanes) v[i / kLanes] = load_part(query + i, lanes_left(d, i));
    if (cache.type == CacheType::kI8) {
        const float scale = store_whole(reinterpret_cast<int16_t*>(s.queries) + row * d, v, d);
        VecF nothing = zero();  // NaN of a query that is not finite, which int16 cannot say
        for (int64_t i = 0; i < d; i += kLanes) nothing = fma(v[i / kLanes], zero(), nothing);
        s.query_scales[row] = scale + sum_lanes(nothing);
        return;
    }
    for (int64_t i = 0; i < d; i += kLanes) {
        const int count = lanes_left(d, i);
        if (cache.type == CacheType::kF32) {
            store_part(reinterpret_cast<float*>(s.queries) + row * d + i, v[i / kLanes], count);
        } else {
            store_bf16_part(reinterpret_cast<uint16_t*>(s.queries) + row * d + i, v[i / kLanes], count);
        }
    }
}

template <class Dot>
static void score_keys(const TileShape& shape, const HeadCache& cache, const TileScratch& s, const KeyTile& tile,
                       const KeyTile& next) {
    TileArguments t;
    Segment segment;
    t.activation_stride = cache.head_dim * 4 / cache.packed();
    t.segments = &segment;
    t.num_segments = 1;
    t.panel_step = Dot::kStep;
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

// Scores become weights in the type that values are multiplied in; those of int8 take the values' scales with them.
// Loop by loop over the rows, so that no row waits for its own sums across lanes.
template <class Dot>
static void weigh_scores(const ScoreRule& rule, const TileShape& shape, const TileScratch& s, const KeyTile& tile) {
    constexpr bool kWhole = std::is_same_v<Dot, DotS16>;
    if (kWhole) widen_scales(s, tile);
    const auto base = static_cast<int32_t>(tile.base), last = static_cast<int32_t>(tile.base + tile.count - 1);
    for (int64_t r = 0; r < shape.rows; ++r) {
        float* scores = s.scores + r * kKeyTile;
        const float factor = rule.factor() * (kWhole ? s.query_scales[r] : 1.0f);
        VecF v[kTileVecs];
        for (int i = 0; i < kTileVecs; ++i) {
            if constexpr (kWhole) {
                const VecI products = load(reinterpret_cast<const int32_t*>(scores) + i * kLanes);
                v[i] = to_float(products) * set1(factor) * load(s.key_scales + i * kLanes);
            } else {
                v[i] = load(scores + i * kLanes) * set1(factor);
            }
        }
        Visible visible = shape.visible[r / shape.heads];
        visible.last = std::min(visible.last, last);
        s.factors[r] = rate_keys(rule, visible, base, v);
        for (int i = 0; i < kTileVecs; ++i) store(scores + i * kLanes, v[i]);
    }
    for (int64_t r = 0; r < shape.rows; ++r) s.factors[r] = raise_maximum(s.states[r], s.factors[r]);
    for (int64_t r = 0; r < shape.rows; ++r) {
        float* scores = s.scores + r * kKeyTile;
        std::byte* weights = s.weights + r * kKeyTile * 2;
        VecF v[kTileVecs];
        for (int i = 0; i < kTileVecs; ++i) v[i] = load(scores + i * kLanes);
        weigh_keys(s.states[r], v);
        for (int i = 0; i < kTileVecs; ++i) {
            if constexpr (kWhole) {
                // Slots that hold no key may hold any scale, NaN too.
                v[i] = select(less(zero(), v[i]), v[i] * load(s.value_scales + i * kLanes), zero());
            } else if constexpr (std::is_same_v<Dot, DotBf16>) {
                store_bf16(reinterpret_cast<uint16_t*>(weights) + i * kLanes, v[i]);
            } else {
                store(scores + i * kLanes, v[i]);
            }
        }
        if constexpr (kWhole) s.weight_scales[r] = store_whole(reinterpret_cast<int16_t*>(weights), v, kKeyTile);
    }
}

// Segments of values that lie one after another; of an odd last pair of bf16, a copy without what no key has written,
// which may be NaN.
static inline int cut_values(const HeadCache& cache, const TileScratch& s, const KeyTile& tile, int64_t first_panel,
                             int panels, Segment* segments) {
    const int64_t step_bytes = cache.value_dim * cache.step_bytes();
    int num_segments = 0;
    const auto add = [&](const std::byte* values, int64_t steps) {
        Segment& segment = segments[num_segments++];
        for (int p = 0; p < panels; ++p) segment.panels[p] = values + (first_panel + p) * 16 * cache.step_bytes();
        segment.steps = steps;
    };
    for (int64_t g = 0; g < tile.groups; ++g) {
        const int64_t keys = std::min<int64_t>(16, tile.count - 16 * g);
        const bool odd = cache.type == CacheType::kBf16 && keys % 2 != 0;
        const int64_t whole_steps = odd ? keys / 2 : (keys + cache.packed() - 1) / cache.packed();
        if (whole_steps > 0) add(tile.values[g], whole_steps);
        if (!odd) continue;
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
    t.panel_step = cache.value_dim * cache.step_bytes();
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
        t.scales = s.weight_scales;
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
    KeyTile tiles[2];
    find_keys(context, begin, first, last, tiles[0]);
    for (int64_t base = begin, number = 0; base < end; base += kKeyTile, ++number) {
        const KeyTile& tile = tiles[number % 2];
        const bool more = base + kKeyTile < end;
        if (more) find_keys(context, base + kKeyTile, first, last, tiles[(number + 1) % 2]);
        const KeyTile& next = more ? tiles[(number + 1) % 2] : after;
        score_keys<Dot>(shape, cache, s, tile, next);
        weigh_scores<Dot>(rule, shape, s, tile);
        add_values<Dot>(shape, cache, s, tile, next);
    }
}

}  // namespace enginery::ENGINERY_ISA
