/* Copy moe.h and this file. c++ -O2 -I. -o cpp examples/cpp.cpp -lm -pthread
   ./cpp MODEL TASK < lines      a trained model answers each line with a label and its probability
   moe.h from C++11: objects that free themselves, errors as exceptions, vectors of strings. */
#include <exception>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>
#define MOE_IMPLEMENTATION
#include "moe.h"

struct Answer {
  std::string label; // of classes; empty where the task has a value
  float score;       // probability of the label, or the value
};

class Model {
public:
  static constexpr int batch = 64; // texts at once

  explicit Model(const std::string &path, int threads = 1) {
    moe_env_init(&env_, MOE_ISA_AUTO);
    env_.log = [](void *user, moe_status, const char *sentence) {
      *static_cast<std::string *>(user) = sentence;
    };
    env_.log_user = &said_;
    if (threads > 1) {
      moe_pool *pool;
      check(moe_pool_create(&pool, threads, &env_));
      pool_.reset(pool);
    }
    moe_model *model;
    check(moe_model_load(&model, path.c_str(), &env_));
    model_.reset(model);
    moe_predictor *predictor;
    check(moe_predictor_create(&predictor, model, batch, &env_)); // copies env_
    predictor_.reset(predictor);
  }
  Model(const Model &) = delete; // said_ must stay where it is
  Model &operator=(const Model &) = delete;

  std::vector<Answer> ask(const std::string &task, const std::vector<std::string> &texts) {
    const int t = moe_model_find_task(model_.get(), task.c_str());
    if (t < 0) throw std::runtime_error("the model has no task \"" + task + "\"");
    const char *const *label = moe_model_task(model_.get(), t)->label;
    const int stride = moe_model_max_classes(model_.get());
    std::vector<float> score(static_cast<size_t>(batch * stride));
    std::vector<int> best(batch);
    std::vector<const char *> part;
    std::vector<Answer> answers;
    for (size_t i = 0; i < texts.size(); i += part.size()) {
      part.clear();
      for (size_t j = i; j < texts.size() && j < i + batch; ++j) part.push_back(texts[j].c_str());
      check(moe_predict_texts(predictor_.get(), t, part.data(), nullptr,
                              static_cast<int>(part.size()), score.data(), best.data()));
      for (size_t j = 0; j < part.size(); ++j)
        answers.push_back({label ? label[best[j]] : "",
                           score[j * static_cast<size_t>(stride) + static_cast<size_t>(best[j])]});
    }
    return answers;
  }

private:
  struct Free {
    void operator()(moe_pool *p) const { moe_pool_free(p); }
    void operator()(moe_model *p) const { moe_model_free(p); }
    void operator()(moe_predictor *p) const { moe_predictor_free(p); }
  };

  void check(moe_status status) {
    if (status != MOE_OK) throw std::runtime_error(said_);
  }

  std::string said_; // the last sentence of the log
  moe_env env_;
  std::unique_ptr<moe_pool, Free> pool_; // freed in the opposite order
  std::unique_ptr<moe_model, Free> model_;
  std::unique_ptr<moe_predictor, Free> predictor_;
};

int main(int argc, char **argv) {
  try {
    if (argc != 3) throw std::runtime_error("usage: cpp MODEL TASK < lines");
    Model model(argv[1]);
    std::vector<std::string> lines;
    for (std::string line; std::getline(std::cin, line);) lines.push_back(line);
    for (const Answer &answer : model.ask(argv[2], lines))
      std::cout << answer.label << "\t" << answer.score << "\n";
  } catch (const std::exception &error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
