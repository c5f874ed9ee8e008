// kv_write: puts the step's keys (normed and rotated) and values into the blocks that hold their sequences' state.
#include "plugins/attention/cache.h"
#include "plugins/attention/head.h"
#include "plugins/operators.h"
#include "plugins/share.h"

namespace enginery::ENGINERY_ISA {

namespace {

uint16_t to_f16(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }

class KvWrite : public Kernel {
  public:
    HeadTransform key_transform;
    HeadCache cache;
    LayerState state;
    BoundOperand k, v, cos, sin;
    int64_t num_kv_heads = 0, k_offset = 0, v_offset = 0, stride = 0;

    void run(const Step& step, const Team& team) override {
        const int64_t* slots = step.groups[static_cast<size_t>(state.group)].slots;
        const Range pairs = share_of(team, step.num_tokens * num_kv_heads, false);
        for (int64_t pair = pairs.begin; pair < pairs.end; ++pair) {
            const int64_t token = pair / num_kv_heads, head = pair % num_kv_heads;
            if (slots[token] >= 0) write(team, token, head, slots[token]);
        }
    }

  private:
    void write(const Team& team, int64_t token, int64_t head, int64_t slot) const {
        alignas(64) float key[kMostHeadDim];
        const int64_t d = cache.head_dim;
        const int64_t row = token * stride + head * d;
        transform_head(key_transform, k.at<const float>(team) + row + k_offset,
                       cos.at<const float>(team) + token * key_transform.half,
                       sin.at<const float>(team) + token * key_transform.half, key);
        const float* value = v.at<const float>(team) + row + v_offset;
        std::byte* to = state.data + slot / cache.block_size * state.block_bytes + head * state.head_bytes;
        const int64_t offset = slot % cache.block_size;
        switch (cache.type) {
            case CacheType::kF32:
                return store_floats(to, offset, key, value);
            case CacheType::kBf16:
                return store_halves(to, offset, key, value);
            case CacheType::kI8:
                return store_bytes_scaled(to, offset, key, value);
        }
    }

    void store_floats(std::byte* to, int64_t offset, const float* key, const float* value) const {
        auto* keys = reinterpret_cast<float*>(to);
        auto* values = reinterpret_cast<float*>(to + cache.values_begin());
        for (int64_t i = 0; i < cache.head_dim; ++i) keys[cache.key_index(offset, i)] = key[i];
        for (int64_t i = 0; i < cache.head_dim; ++i) values[cache.value_index(offset, i)] = value[i];
    }

    void store_halves(std::byte* to, int64_t offset, const float* key, const float* value) const {
        auto* keys = reinterpret_cast<uint16_t*>(to);
        auto* values = reinterpret_cast<uint16_t*>(to + cache.values_begin());
        uint16_t halves[kMostHeadDim];
        convert(key, halves);
        for (int64_t i = 0; i < cache.head_dim; ++i) keys[cache.key_index(offset, i)] = halves[i];
        convert(value, halves);
        for (int64_t i = 0; i < cache.head_dim; ++i) values[cache.value_index(offset, i)] = halves[i];
    }

    void convert(const float* from, uint16_t* to) const {
        for (int64_t i = 0; i < cache.head_dim; i += kLanes) {
            const int count = lanes_left(cache.head_dim, i);
            store_bf16_part(to + i, load_part(from + i, count), count);
        }
    }

    void store_bytes_scaled(std::byte* to, int64_t offset, const float* key, const float* value) const {
        auto* keys = reinterpret_cast<int8_t*>(to);
        auto* values = reinterpret_cast<int8_t*>(to + cache.values_begin());
        int8_t bytes[kMostHeadDim];
        const float most_key = largest_magnitude(key, cache.head_dim), most = largest_magnitude(value, cache.head_dim);
        // The key tells of values that are not finite too: NaN, as the scores of all that see them.
        cache.key_scales(to)[offset] = quantize(key, most_key + 0.0f * most, bytes);
        for (int64_t i = 0; i < cache.head_dim; ++i) keys[cache.key_index(offset, i)] = bytes[i];
        cache.value_scales(to)[offset] = quantize(value, most, bytes);
        for (int64_t i = 0; i < cache.head_dim; ++i) values[cache.value_index(offset, i)] = bytes[i];
    }

    // most: the greatest magnitude, or NaN. Divides by the scale as float16 holds it, so that its rounding is made good
    // by the values.
    uint16_t quantize(const float* from, float most, int8_t* to) const {
        const float wanted = most / 127.0f;
        const uint16_t half = to_f16(wanted > 65504.0f ? 65504.0f : wanted);
        const float scale = _cvtsh_ss(half);
        const VecF divisor = set1(scale > 0.0f ? scale : 1.0f);
        for (int64_t i = 0; i < cache.head_dim; i += kLanes) {
            const int count = lanes_left(cache.head_dim, i);
            const VecF quotient = scale > 0.0f ? load_part(from + i, count) / divisor : zero();
            store_bytes_part(to + i, to_int(max(set1(-127.0f), min(set1(127.0f), quotient))), count);
        }
        return half;
    }
};

}  // namespace

std::unique_ptr<Kernel> make_kv_write(const CallSpec& call, const Binding& binding) {
    CallReader reader(call, binding);
    auto kernel = std::make_unique<KvWrite>();
    const int64_t d = reader.integer("head_dim", 8, kMostHeadDim);
    if (d % 8 != 0) reader.fault("attribute head_dim: wanted a multiple of 8, got " + std::to_string(d));
    kernel->num_kv_heads = reader.integer("num_kv_heads", 1, 1 << 16);
    const int64_t rot_dim = reader.integer("rot_dim", 0, d);
    if (rot_dim % 2 != 0) reader.fault("attribute rot_dim: wanted an even number, got " + std::to_string(rot_dim));
    kernel->stride = reader.integer("stride", 1, kLargestColumns);
    kernel->k_offset = reader.integer("k_offset", 0, kLargestColumns);
    kernel->v_offset = reader.integer("v_offset", 0, kLargestColumns);
    const int64_t columns = kernel->num_kv_heads * d;
    if (kernel->k_offset + columns > kernel->stride || kernel->v_offset + columns > kernel->stride) {
        reader.fault("attributes k_offset and v_offset: " + std::to_string(columns) +
                     " columns from there on leave a row of " + std::to_string(kernel->stride));
    }
    const int64_t tokens = reader.largest(Domain::kTokens);
    const int64_t row_bytes = kernel->stride * 4;
    reader.input("positions");
    reader.input("slots");
    kernel->k = reader.required("k", {"f32"}, tokens * row_bytes);
    kernel->v = reader.required("v", {"f32"}, tokens * row_bytes);
    if (rot_dim > 0 || reader.has("cos")) kernel->cos = reader.required("cos", {"f32"}, tokens * rot_dim / 2 * 4);
    if (rot_dim > 0 || reader.has("sin")) kernel->sin = reader.required("sin", {"f32"}, tokens * rot_dim / 2 * 4);
    kernel->key_transform.head_dim = d;
    kernel->key_transform.half = rot_dim / 2;
    kernel->key_transform.eps = static_cast<float>(reader.number("eps", 0.0, 1.0));
    kernel->key_transform.norm = reinterpret_cast<const float*>(reader.optional("k_norm", {"rows_f32.v0"}, d * 4).data);
    kernel->state = reader.state("state", kernel->num_kv_heads, d);
    kernel->cache = HeadCache::of(kernel->state, d);
    reader.finish();
    return kernel;
}

}  // namespace enginery::ENGINERY_ISA
