/* Random cases of LayerNorm, dropout, embeddings and attention. */
#ifndef CASES_ROWS_H
#define CASES_ROWS_H

static void case_layernorm(Case &c) {
  Sequences s = cases_sequences(c, 6, c.number % 8 == 7 ? 60 : 12);
  int H = c.number % 7 == 2 ? 1 : c.number % 7 == 3 ? 65 : c.number % 14 == 5 ? 257 : c.pick(2, 90);
  size_t n = (size_t)s.M * (size_t)H;
  bool delta = c.chance(70), dropout = delta && c.chance(60), keep = c.chance(50);
  bool overwrite = c.chance(50);
  auto keys = cases_keys(c, s.S, dropout);
  auto x = c.input("x", n, 2), d = c.input("delta", n, 1, delta), gamma = c.input("gamma", H);
  auto beta = c.input("beta", H), dy = c.input("dy", n), y = c.output("y", n);
  bool only_forward = c.number % 9 == 8; /* then mean and rstd are not asked for */
  auto sum = c.output("sum", n, delta || keep), mean = c.output("mean", s.M, !only_forward);
  auto rstd = c.output("rstd", s.M, !only_forward), dx = c.gradient("dx", n, c.chance(90));
  auto ddelta = c.output("ddelta", n, c.chance(70));
  auto dgamma = c.gradient("dgamma", H, c.chance(85)), dbeta = c.gradient("dbeta", H, c.chance(85));
  if (only_forward) c.expect(ddelta, ANY_VALUE);
  c.send();
  for (int back = 0; back < 2 - only_forward; ++back)
    for (int side = CPU; side < SIDES; ++side) {
      moe_layernorm_op op;
      moe_layernorm_op_init(&op);
      op.y = y.at(side), op.sum = sum.at(side), op.mean = mean.at(side), op.rstd = rstd.at(side);
      op.x = x.at(side), op.delta = d.at(side), op.gamma = gamma.at(side), op.beta = beta.at(side);
      op.dropout = dropout ? 0.3f : 0, op.keys = keys.at(side), op.seq_start = s.start.at(side);
      op.S = s.S, op.M = s.M, op.H = H;
      op.dx = dx.at(side), op.ddelta = ddelta.at(side), op.dgamma = dgamma.at(side);
      op.dbeta = dbeta.at(side), op.dy = dy.at(side), op.overwrite = overwrite;
      c.status(CASES_RUN(c, side, layernorm, op, back), side);
    }
  c.compare();
}

static void case_dropout(Case &c) {
  Sequences s = cases_sequences(c, 8, 12);
  int H = c.pick(1, 90);
  size_t n = (size_t)s.M * (size_t)H;
  bool in_place = c.chance(30);
  auto keys = cases_keys(c, s.S, c.chance(90));
  auto x = c.input("x", n), y = c.output("y", n);
  if (in_place) c.expect(x, NEAR), y = x;
  c.tolerance = 1e-7;
  c.send();
  for (int side = CPU; side < SIDES; ++side) {
    moe_dropout_op op;
    moe_dropout_op_init(&op);
    op.y = y.at(side), op.x = x.at(side), op.dropout = c.number % 5 ? 0.25f : 0;
    op.keys = keys.at(side), op.seq_start = s.start.at(side), op.S = s.S, op.M = s.M, op.H = H;
    c.dirty_scratch();
    c.status(side == CPU ? moe_dropout_forward(&op, &cases_cpu)
                         : cases_gpu.dropout(&cases_gpu, &cases_env, &op),
             side);
  }
  c.compare();
}

static void case_embed(Case &c) {
  Sequences s = cases_sequences(c, 8, 12);
  int H = c.number % 6 == 5   ? 33
          : c.number % 6 == 2 ? c.pick(129, 200)
                              : c.pick(1, 70),
      V = c.number % 11 == 3 ? 70000 : c.pick(1, 40), P = s.longest + c.pick(0, 2),
      kinds = c.chance(70) ? 2 : 256;
  if (V > 40) H = c.pick(1, 3); /* ids of more than 16 bits */
  size_t n = (size_t)s.M * (size_t)H;
  bool words = c.chance(80), segments = c.chance(60), position = c.chance(80);
  auto ids = c.array<int32_t>("ids", s.M, SAME);
  auto kind = c.array<uint8_t>("segments", s.M, SAME, segments);
  for (int i = 0; i < s.M; ++i) {
    ids[(size_t)i] = c.pick(0, V - 1);
    if (segments) kind[(size_t)i] = (uint8_t)c.pick(0, kinds - 1);
  }
  if (V > 40) ids[0] = 255;
  if (segments) kind[0] = (uint8_t)(kinds - 1);
  auto word = c.input("word", (size_t)V * (size_t)H, 1, words);
  auto place = c.input("position", (size_t)P * (size_t)H, 1, position);
  auto segment = c.input("segment", (size_t)(kinds * H), 1, c.chance(70));
  auto x = words ? c.output("x", n) : c.gradient("x", n), dx = c.input("dx", n);
  auto dword = c.gradient("dword", (size_t)V * (size_t)H, words && c.chance(85));
  auto dposition = c.gradient("dposition", (size_t)P * (size_t)H, position && c.chance(85));
  auto dsegment = c.gradient("dsegment", (size_t)(kinds * H), segment.index >= 0 && c.chance(85));
  c.send();
  for (int back = 0; back < 2; ++back)
    for (int side = CPU; side < SIDES; ++side) {
      moe_embed_op op;
      moe_embed_op_init(&op);
      op.x = back ? nullptr : x.at(side), op.ids = ids.at(side), op.segments = kind.at(side);
      op.word = word.at(side), op.position = place.at(side), op.segment = segment.at(side);
      op.seq_start = s.start.at(side), op.S = s.S, op.M = s.M, op.H = H;
      if (back) op.dword = dword.at(side), op.dposition = dposition.at(side);
      if (back) op.dsegment = dsegment.at(side), op.dx = dx.at(side);
      c.status(CASES_RUN(c, side, embed, op, back), side);
    }
  c.compare();
}

static void case_attention(Case &c) {
  static const int widths[] = {16, 32, 64, 128, 24, 40, 17, 25};
  Sequences s = cases_sequences(c, 4, c.number % 6 == 5 ? 140 : 20);
  int A = c.pick(1, 3), H = A * widths[c.number % 8];
  size_t n = (size_t)s.M * (size_t)H;
  bool dropout = c.chance(50), overwrite = c.chance(50);
  auto keys = cases_keys(c, s.S, dropout);
  auto qkv = c.input("qkv", 3 * n, 2), dy = c.input("dy", n), y = c.output("y", n);
  auto stats = c.output("stats", 2 * (size_t)s.M * (size_t)A);
  auto dqkv = c.gradient("dqkv", 3 * n);
  size_t floats = moe_attention_scratch(s.longest, H, A, 1, &cases_cpu);
  auto scratch = c.array<float>("scratch", floats, ANY_VALUE);
  c.send();
  for (int back = 0; back < 2; ++back)
    for (int side = CPU; side < SIDES; ++side) {
      moe_attention_op op;
      moe_attention_op_init(&op);
      op.y = y.at(side), op.stats = stats.at(side), op.qkv = qkv.at(side);
      op.dropout = dropout ? 0.2f : 0, op.keys = keys.at(side), op.seq_start = s.start.at(side);
      op.S = s.S, op.M = s.M, op.H = H, op.A = A, op.longest = s.longest + c.number % 2;
      op.scratch = scratch.at(side), op.dqkv = dqkv.at(side), op.dy = dy.at(side);
      op.overwrite = overwrite;
      c.status(CASES_RUN(c, side, attention, op, back), side);
    }
  c.compare();
}
#endif
