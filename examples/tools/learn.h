/* learn.h - learns a WordPiece vocabulary from texts: pieces are joined by frequency, as the
   trainer of Hugging Face `tokenizers` does it

     learner l;
     begin_learning(&l, 0);
     learn_text(&l, text, bytes);              as often as there are texts
     vocab = learn_vocab(&l, 4000);            lines of a vocab.txt

   Every word is cut into characters, of which all but the first begin with "##". The most frequent
   pair of neighbours, of equal ones the pair with the lowest numbers, becomes a piece, again and
   again, until there are as many pieces as are asked for, or no pair occurs twice. Words are those
   of moe.h's tokenizer, which cli.h includes whole. */
#ifndef TOOLS_LEARN_H
#define TOOLS_LEARN_H
#include "cli.h"

enum { LEARN_ALPHABET = 1000 }; /* most characters; words with others are left out */

/* Strings with a number each, found by their bytes. */
typedef struct string_map {
  text bytes;
  size_t *start; /* (n + 1) */
  int64_t *value;
  int32_t *slot, n, room, slots;
} string_map;

static inline uint64_t hash_bytes(const char *s, size_t n) {
  uint64_t h = 0xcbf29ce484222325u;
  while (n--) h = (h ^ (unsigned char)*s++) * 0x100000001b3u;
  return h ^ h >> 29;
}

static inline void free_strings(string_map *m) {
  free(m->bytes.data), free(m->start), free(m->value), free(m->slot);
}

static inline const char *string_at(const string_map *m, int32_t i) {
  return m->bytes.data + m->start[i];
}

static inline size_t string_bytes(const string_map *m, int32_t i) {
  return m->start[i + 1] - m->start[i];
}

/* The number of a string, which joins with value 0 if it is new. */
static inline int32_t string_number(string_map *m, const char *s, size_t n) {
  int32_t i;
  uint64_t at;
  if (2 * m->n >= m->slots) {
    m->slots = m->slots ? 2 * m->slots : 1024;
    m->slot = (int32_t *)grow(m->slot, (size_t)m->slots, sizeof *m->slot);
    memset(m->slot, -1, (size_t)m->slots * sizeof *m->slot);
    for (i = 0; i < m->n; ++i) {
      at = hash_bytes(string_at(m, i), string_bytes(m, i));
      while (m->slot[at &= (uint64_t)m->slots - 1] >= 0) ++at;
      m->slot[at] = i;
    }
  }
  for (at = hash_bytes(s, n); (i = m->slot[at &= (uint64_t)m->slots - 1]) >= 0; ++at)
    if (string_bytes(m, i) == n && !memcmp(string_at(m, i), s, n)) return i;
  if (m->n + 2 > m->room) {
    m->room = 2 * m->room + 1024;
    m->start = (size_t *)grow(m->start, (size_t)m->room + 1, sizeof *m->start);
    m->value = (int64_t *)grow(m->value, (size_t)m->room, sizeof *m->value);
  }
  m->start[m->n] = m->bytes.bytes;
  put_bytes(&m->bytes, s, n);
  m->start[m->n + 1] = m->bytes.bytes;
  m->value[m->n] = 0;
  m->slot[at] = m->n;
  return m->n++;
}

static inline void add_to_string(string_map *m, const char *s, size_t n, int64_t more) {
  int32_t i = string_number(m, s, n); /* which may move m->value */
  m->value[i] += more;
}

/* Two neighbours: how often, and the words that may have them (some more than once). */
typedef struct piece_pair {
  int32_t a, b, n, room, *word;
  int64_t count;
} piece_pair;

/* A pair in the heap, with the count that it had. */
typedef struct candidate {
  int64_t count;
  int32_t pair;
} candidate;

typedef struct learner {
  moe_tokenizer *tokenizer;
  string_map words, pieces; /* words: how often each occurs */
  int32_t *symbol, *length; /* pieces of each word; where they begin is in `first` */
  size_t *first;
  piece_pair *pair;
  int32_t *slot, pairs, pair_room, slots; /* pairs by (a, b) */
  int32_t before;                         /* pairs that there were before the present join */
  candidate *heap;
  size_t heaped, heap_room;
} learner;

static inline void begin_learning(learner *l, int cased) {
  static const char five[] = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n";
  memset(l, 0, sizeof *l);
  need(moe_tokenizer_create(&l->tokenizer, five, sizeof five - 1, cased, &env));
}

/* Counts the words of a text. */
static inline void learn_text(learner *l, const char *s, size_t bytes) {
  moe__reader r;
  text word = {NULL, 0, 0};
  unsigned char character[4];
  int kind = MOE__TEXT_BLANK;
  memset(&r, 0, sizeof r);
  r.t = l->tokenizer;
  r.s = (const unsigned char *)s;
  r.bytes = bytes;
  while (kind != MOE__TEXT_END) {
    size_t n;
    kind = moe__reader_next(&r);
    if (kind != MOE__TEXT_LETTER && word.bytes) {
      add_to_string(&l->words, word.data, word.bytes, 1);
      word.bytes = 0;
    }
    if (kind != MOE__TEXT_LETTER && kind != MOE__TEXT_PUNCTUATION && kind != MOE__TEXT_IDEOGRAPH)
      continue;
    n = moe__utf8_write(character, r.c);
    if (kind == MOE__TEXT_LETTER)
      put_bytes(&word, (char *)character, n);
    else
      add_to_string(&l->words, (char *)character, n, 1);
  }
  free(word.data);
}

/* Bytes of the character that begins here. */
static inline size_t character_bytes(const char *s) {
  unsigned char c = (unsigned char)*s;
  return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}

static inline int by_text(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The most frequent characters, in their order; behind them with "##" those that occur inside
   words. */
static inline void learn_alphabet(learner *l) {
  string_map all, inside;
  const char **sorted;
  int64_t least = 0;
  int32_t i, n, kept = 0, pass;
  memset(&all, 0, sizeof all);
  memset(&inside, 0, sizeof inside);
  for (i = 0; i < l->words.n; ++i) {
    const char *begin = string_at(&l->words, i), *s, *end = begin + string_bytes(&l->words, i);
    for (s = begin; s < end; s += character_bytes(s)) {
      add_to_string(&all, s, character_bytes(s), l->words.value[i]);
      if (s > begin) string_number(&inside, s, character_bytes(s));
    }
  }
  for (n = all.n; n > LEARN_ALPHABET; ++least) /* the rarest are left out, all of one count */
    for (n = i = 0; i < all.n; ++i) n += all.value[i] > least;
  sorted = (const char **)take((size_t)all.n, sizeof *sorted);
  for (i = 0; i < all.n; ++i)
    if (all.value[i] > least || all.n <= LEARN_ALPHABET)
      sorted[kept++] = printed("%.*s", (int)string_bytes(&all, i), string_at(&all, i));
  qsort(sorted, (size_t)kept, sizeof *sorted, by_text);
  for (pass = 0; pass < 2; ++pass)
    for (i = 0; i < kept; ++i) {
      const char *name = pass ? printed("##%s", sorted[i]) : sorted[i];
      int32_t known = inside.n;
      if (!pass || string_number(&inside, sorted[i], strlen(sorted[i])) < known)
        string_number(&l->pieces, name, strlen(name));
    }
  free(sorted);
  free_strings(&all), free_strings(&inside);
}

/* Cuts the words into characters. One with a character outside of the alphabet has no symbols. */
static inline void cut_words(learner *l) {
  int32_t i, known = l->pieces.n;
  l->first = (size_t *)take((size_t)l->words.n, sizeof *l->first);
  l->length = (int32_t *)take((size_t)l->words.n, sizeof *l->length);
  l->symbol = (int32_t *)take(l->words.bytes.bytes, sizeof *l->symbol);
  for (i = 0; i < l->words.n; ++i) {
    const char *begin = string_at(&l->words, i), *s, *end = begin + string_bytes(&l->words, i);
    char name[8] = "##";
    l->first[i] = l->words.start[i]; /* a word has no more characters than bytes */
    for (s = begin; s < end; s += character_bytes(s)) {
      int32_t piece;
      size_t n = character_bytes(s);
      memcpy(name + 2, s, n);
      piece = s == begin ? string_number(&l->pieces, s, n) : string_number(&l->pieces, name, n + 2);
      if (piece >= known) break;
      l->symbol[l->first[i] + (size_t)l->length[i]++] = piece;
    }
    if (s < end) l->length[i] = 0;
  }
}

/* ---- pairs ---- */

static inline int better(const learner *l, candidate x, candidate y) {
  const piece_pair *p = &l->pair[x.pair], *q = &l->pair[y.pair];
  if (x.count != y.count) return x.count > y.count;
  return p->a != q->a ? p->a < q->a : p->b < q->b;
}

static inline void push(learner *l, int32_t pair) {
  candidate x = {l->pair[pair].count, pair};
  size_t i;
  if (l->heaped == l->heap_room)
    l->heap = (candidate *)grow(l->heap, l->heap_room = 2 * l->heap_room + 1024, sizeof x);
  for (i = l->heaped++; i && better(l, x, l->heap[(i - 1) / 2]); i = (i - 1) / 2)
    l->heap[i] = l->heap[(i - 1) / 2];
  l->heap[i] = x;
}

static inline candidate pop(learner *l) {
  candidate top = l->heap[0], x = l->heap[--l->heaped];
  size_t i = 0, child;
  for (; (child = 2 * i + 1) < l->heaped; i = child) {
    if (child + 1 < l->heaped && better(l, l->heap[child + 1], l->heap[child])) ++child;
    if (!better(l, l->heap[child], x)) break;
    l->heap[i] = l->heap[child];
  }
  l->heap[i] = x;
  return top;
}

static inline uint64_t pair_hash(int32_t a, int32_t b) {
  uint64_t h = ((uint64_t)(uint32_t)a << 32 | (uint32_t)b) * 0x9e3779b97f4a7c15u;
  return h ^ h >> 32;
}

/* The number of a pair, which joins if it is new. */
static inline int32_t pair_number(learner *l, int32_t a, int32_t b) {
  uint64_t at;
  int32_t i;
  if (2 * l->pairs >= l->slots) {
    l->slots = l->slots ? 2 * l->slots : 4096;
    l->slot = (int32_t *)grow(l->slot, (size_t)l->slots, sizeof *l->slot);
    memset(l->slot, -1, (size_t)l->slots * sizeof *l->slot);
    for (i = 0; i < l->pairs; ++i) {
      at = pair_hash(l->pair[i].a, l->pair[i].b);
      while (l->slot[at &= (uint64_t)l->slots - 1] >= 0) ++at;
      l->slot[at] = i;
    }
  }
  for (at = pair_hash(a, b); (i = l->slot[at &= (uint64_t)l->slots - 1]) >= 0; ++at)
    if (l->pair[i].a == a && l->pair[i].b == b) return i;
  if (l->pairs == l->pair_room)
    l->pair = (piece_pair *)grow(l->pair, (size_t)(l->pair_room = 2 * l->pair_room + 1024),
                                 sizeof *l->pair);
  memset(&l->pair[l->pairs], 0, sizeof *l->pair);
  l->pair[l->pairs].a = a;
  l->pair[l->pairs].b = b;
  l->slot[at] = l->pairs;
  return l->pairs++;
}

/* A word gets, or loses (sign -1), a pair of neighbours. */
static inline void count_pair(learner *l, int32_t a, int32_t b, int32_t word, int sign) {
  int32_t i = pair_number(l, a, b);
  piece_pair *p = &l->pair[i];
  p->count += sign * l->words.value[word];
  if (sign < 0) return;
  if (!p->n || p->word[p->n - 1] != word) {
    if (p->n == p->room)
      p->word = (int32_t *)grow(p->word, (size_t)(p->room = 2 * p->room + 4), sizeof *p->word);
    p->word[p->n++] = word;
  }
  if (i < l->before) push(l, i); /* two ways to one piece: more frequent than the heap knows */
}

/* Joins a and b to `piece` wherever a word has them side by side. */
static inline void join_in_word(learner *l, int32_t word, int32_t a, int32_t b, int32_t piece) {
  int32_t *s = l->symbol + l->first[word], n = l->length[word], i, to = 0;
  for (i = 0; i < n; ++i) {
    if (i + 1 == n || s[i] != a || s[i + 1] != b) {
      s[to++] = s[i];
      continue;
    }
    if (to) count_pair(l, s[to - 1], a, word, -1), count_pair(l, s[to - 1], piece, word, 1);
    if (i + 2 < n) count_pair(l, b, s[i + 2], word, -1), count_pair(l, piece, s[i + 2], word, 1);
    s[to++] = piece;
    ++i;
  }
  l->length[word] = to;
}

/* The piece that two pieces make. */
static inline int32_t joined_piece(learner *l, int32_t a, int32_t b) {
  text name = {NULL, 0, 0};
  int32_t piece;
  put_bytes(&name, string_at(&l->pieces, a), string_bytes(&l->pieces, a));
  put_bytes(&name, string_at(&l->pieces, b) + 2, string_bytes(&l->pieces, b) - 2);
  piece = string_number(&l->pieces, name.data, name.bytes);
  free(name.data);
  return piece;
}

/* Takes the best pair there is. 0: none occurs twice. */
static inline int join_best(learner *l) {
  while (l->heaped) {
    candidate top = pop(l);
    piece_pair p = l->pair[top.pair];
    int32_t piece, i;
    if (top.count != p.count) { /* it has changed since */
      if (p.count > 1) push(l, top.pair);
      continue;
    }
    if (p.count < 2) return 0;
    piece = joined_piece(l, p.a, p.b);
    l->before = l->pairs;
    l->pair[top.pair].n = l->pair[top.pair].room = 0;
    l->pair[top.pair].word = NULL;
    for (i = 0; i < p.n; ++i) join_in_word(l, p.word[i], p.a, p.b, piece);
    l->pair[top.pair].count = 0;
    free(p.word);
    for (i = l->before; i < l->pairs; ++i)
      if (l->pair[i].count > 1) push(l, i);
    return 1;
  }
  return 0;
}

/* The lines of a vocabulary of at most `size` words, fewer where the texts have no more. Ends the
   learner. */
static inline text learn_vocab(learner *l, int size) {
  static const char *const five[] = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};
  text out = {NULL, 0, 0};
  int32_t i, k;
  for (i = 0; i < 5; ++i) string_number(&l->pieces, five[i], strlen(five[i]));
  learn_alphabet(l);
  if (l->pieces.n > size)
    die("a vocabulary of %d words: the characters of the texts alone are %d", size,
        (int)l->pieces.n);
  cut_words(l);
  for (i = 0; i < l->words.n; ++i)
    for (k = 0; k + 1 < l->length[i]; ++k)
      count_pair(l, l->symbol[l->first[i] + (size_t)k], l->symbol[l->first[i] + (size_t)k + 1], i,
                 1);
  for (i = 0; i < l->pairs; ++i) push(l, i);
  while (l->pieces.n < size && join_best(l)) continue;
  for (i = 0; i < l->pieces.n && i < size; ++i)
    put(&out, "%.*s\n", (int)string_bytes(&l->pieces, i), string_at(&l->pieces, i));
  for (i = 0; i < l->pairs; ++i) free(l->pair[i].word);
  free(l->pair), free(l->slot), free(l->heap), free(l->symbol), free(l->length), free(l->first);
  free_strings(&l->words), free_strings(&l->pieces);
  moe_tokenizer_free(l->tokenizer);
  return out;
}
#endif
