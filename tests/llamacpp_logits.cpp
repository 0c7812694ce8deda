// Logits that llama.cpp computes of given tokens, for tests of docs/upstream.
//
//   llamacpp_logits MODEL UBATCH FLASH_ATTENTION UNIFIED_KV < batches > logits
//
// A line is a batch; its parts, apart by "/", are "SEQUENCE OUTPUTS TOKEN TOKEN ...": the last so many have an output.
// Of each output, in order, the logits are written, in float32. Keys and values are kept in float32, too.

#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

static void fail(const char * what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

// Adds a part to the batch, behind what its sequence has in the cache.
static void add_part(llama_context * ctx, llama_batch & batch, const std::string & part) {
    std::istringstream in(part);
    llama_seq_id sequence;
    int outputs;
    if (!(in >> sequence >> outputs)) {
        fail("a part is no \"SEQUENCE OUTPUTS TOKEN ...\"");
    }
    std::vector<llama_token> tokens;
    for (llama_token token; in >> token;) {
        tokens.push_back(token);
    }
    const llama_pos past = llama_memory_seq_pos_max(llama_get_memory(ctx), sequence) + 1;
    const int count = (int) tokens.size();
    for (int i = 0; i < count; ++i, ++batch.n_tokens) {
        batch.token   [batch.n_tokens]    = tokens[i];
        batch.pos     [batch.n_tokens]    = past + i;
        batch.n_seq_id[batch.n_tokens]    = 1;
        batch.seq_id  [batch.n_tokens][0] = sequence;
        batch.logits  [batch.n_tokens]    = i >= count - outputs;
    }
}

int main(int argc, char ** argv) {
    if (argc != 5) {
        fail("usage: llamacpp_logits MODEL UBATCH FLASH_ATTENTION UNIFIED_KV < batches > logits");
    }
    llama_backend_init();

    llama_model_params of_model = llama_model_default_params();
    of_model.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(argv[1], of_model);
    if (!model) {
        fail("cannot load the model");
    }

    const int most = 2048;
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = most;
    params.n_batch         = most;
    params.n_ubatch        = atoi(argv[2]);
    params.n_seq_max       = 2;
    params.n_threads       = 2;
    params.n_threads_batch = 2;
    params.type_k          = GGML_TYPE_F32;
    params.type_v          = GGML_TYPE_F32;
    params.flash_attn_type = atoi(argv[3]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.kv_unified      = atoi(argv[4]);
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        fail("cannot make a context");
    }

    const size_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_batch batch = llama_batch_init(most, 0, 1);
    for (std::string line; std::getline(std::cin, line);) {
        batch.n_tokens = 0;
        std::istringstream parts(line);
        for (std::string part; std::getline(parts, part, '/');) {
            add_part(ctx, batch, part);
        }
        if (llama_decode(ctx, batch)) {
            fail("cannot run a batch");
        }
        for (int i = 0; i < batch.n_tokens; ++i) {
            if (batch.logits[i]) {
                fwrite(llama_get_logits_ith(ctx, i), sizeof(float), n_vocab, stdout);
            }
        }
    }
    llama_batch_free(batch);
    llama_free(ctx);
    llama_model_free(model);
}
