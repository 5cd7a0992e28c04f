/* routers.h - the routers of examples/tools/routers.h, in double by PyTorch. Written by
   make_routers.py; do not edit.

   3 tasks, 4 layers, 3 blocks, vectors of 8. Weights: golden_fill(p, count, NAME, scale), NAME as
   in routers.h, scale 1 for vectors and layers, 0.25 for all else, plus 1 for norm1.weight and
   norm2.weight. For each kind: the scores, and for every tensor the norm of the gradient of sum of
   scores times golden_fill("probe", 1), and the sum of that gradient times golden_fill(NAME,
   1). */
#ifndef GOLDEN_ROUTERS_H_INCLUDED
#define GOLDEN_ROUTERS_H_INCLUDED
#include "golden.h"

/* lstm */
static const double routers_lstm_scores[36] = {
0.0366335191,-0.0775212909,0.143089793,0.0600218393,0.0492813513,0.0433792464,0.0558532345,0.01124942,-0.0293588347,
0.161393648,-0.0622609389,0.0698085318,0.0506997301,-0.058608964,0.0623036543,0.0798177909,0.0668572052,-0.0785335873,
0.0901413668,0.0378719021,-0.211086426,0.159098069,-0.0489311094,-0.0835018329,-0.0864147979,-0.104244124,
0.0529024579,-0.136116812,0.00590894365,-0.0934696794,-0.217010916,-0.0176215648,-0.225548201,-0.144731209,
-0.103233769,-0.148244781
};
static const golden_number routers_lstm_norms[7] = {
  {"vectors", 0.472610906},
  {"layers", 0.426382831},
  {"out.weight", 2.25543696},
  {"out.bias", 2.0434202},
  {"lstm.input.weight", 2.08682802},
  {"lstm.hidden.weight", 0.797554561},
  {"lstm.bias", 1.47753423},
};
static const golden_number routers_lstm_probes[7] = {
  {"vectors", 0.193116683},
  {"layers", 0.0693223975},
  {"out.weight", 2.45434122},
  {"out.bias", -0.431699203},
  {"lstm.input.weight", 1.04975632},
  {"lstm.hidden.weight", 0.855807985},
  {"lstm.bias", 1.24854838},
};

/* transformer */
static const double routers_transformer_scores[36] = {
-0.573463199,-1.2495479,-0.55631008,0.73910273,-0.731060276,0.521294527,0.190989395,-0.592080408,0.263192463,
-0.719931856,-1.89433248,-0.203441465,-1.04861819,-1.39484053,-0.50940897,-0.101315685,-1.00328702,0.113456083,
-0.687118532,-0.906413672,-0.063619904,-0.924344221,-1.70638534,-0.121232576,-1.20387006,-0.782136426,0.754138228,
-0.0990304044,-0.249064117,1.57242756,-1.05751131,-0.425059949,1.21276591,-0.637812173,-0.463345159,0.731602502
};
static const golden_number routers_transformer_norms[18] = {
  {"vectors", 3.79612259},
  {"layers", 3.79221973},
  {"out.weight", 21.2029729},
  {"out.bias", 2.0434202},
  {"in.weight", 20.6338981},
  {"in.bias", 12.2219189},
  {"qkv.weight", 15.5631392},
  {"qkv.bias", 8.73213372},
  {"attention.weight", 15.7706924},
  {"attention.bias", 6.66585579},
  {"norm1.weight", 3.47789078},
  {"norm1.bias", 3.11024536},
  {"up.weight", 20.5051352},
  {"up.bias", 2.31151296},
  {"down.weight", 18.2756224},
  {"down.bias", 1.12468734},
  {"norm2.weight", 2.75183361},
  {"norm2.bias", 2.16014688},
};
static const golden_number routers_transformer_probes[18] = {
  {"vectors", -0.433698906},
  {"layers", -1.82916931},
  {"out.weight", -4.48294597},
  {"out.bias", -0.431699203},
  {"in.weight", -9.05147285},
  {"in.bias", -1.71809175},
  {"qkv.weight", 0.400054879},
  {"qkv.bias", 2.64383909},
  {"attention.weight", 3.11275076},
  {"attention.bias", 8.05685063},
  {"norm1.weight", 0.223262809},
  {"norm1.bias", -2.25010655},
  {"up.weight", 1.86302381},
  {"up.bias", -0.253663079},
  {"down.weight", 5.11849552},
  {"down.bias", 9.84536565e-05},
  {"norm2.weight", 2.16738722},
  {"norm2.bias", -1.20502201},
};
#endif
