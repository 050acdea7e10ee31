/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Sets of granules, as a tree.
 *
 * A leaf has the bits of LEAF_BITS granules.  An inner node has FANOUT
 * slots for nodes of the level below.  A slot is NULL where all is clean
 * and FULL where all is dirty, so those are the summary that lets counting
 * and searching skip what is uniform, and the memory that such areas do
 * not take.
 *
 * Nodes are added to slots and filled, never replaced or freed while
 * others may use the tree: that makes all other functions lock-free.  Only
 * the exclusive ones take nodes away.  A FULL slot may have granules
 * behind it which the disk does not have; all functions cut at its end.
 * The bits of a leaf behind the end of the disk are always 0.
 */

#include <config.h>

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "dirty/bits.h"

#define WORD_BITS 64
#define LEAF_WORDS 64
#define LEAF_SHIFT 12
#define LEAF_BITS (UINT64_C (1) << LEAF_SHIFT)
#define FANOUT_SHIFT 9
#define FANOUT (1 << FANOUT_SHIFT)

G_STATIC_ASSERT (LEAF_BITS == DIRTY_EXPORT_BITS);
G_STATIC_ASSERT (LEAF_BITS == LEAF_WORDS * WORD_BITS);

typedef _Atomic (void *) slot;

struct leaf {
  _Atomic uint64_t words[LEAF_WORDS];
};

struct inner {
  slot slots[FANOUT];
};

struct dirty_bits {
  uint64_t size;                /* of the disk */
  uint64_t length;              /* granules */
  unsigned granularity_bits;
  unsigned levels;              /* of inner nodes above the leaves */
  slot root;
};

static char full_mark;
#define FULL ((void *) &full_mark)

static bool
is_node (const void *p)
{
  return p != NULL && p != FULL;
}

/* How many bits a slot at a level spans, as a power of two. */
static unsigned
span_shift (unsigned level)
{
  return LEAF_SHIFT + FANOUT_SHIFT * level;
}

/* Where the span of a slot that begins at base ends. */
static uint64_t
span_end (uint64_t base, unsigned level)
{
  return base + (UINT64_C (1) << span_shift (level));
}

static unsigned
levels_for (uint64_t length)
{
  unsigned level = 0;

  while (length > UINT64_C (1) << span_shift (level))
    level++;
  return level;
}

/* The bits of word number w, whose leaf begins at base, that lie from
 * begin to before end; all are bits of the set.
 */
static uint64_t
word_mask (uint64_t base, unsigned w, uint64_t begin, uint64_t end)
{
  const uint64_t first = base + w * WORD_BITS;
  uint64_t mask = UINT64_MAX;

  if (begin > first)
    mask &= begin - first < WORD_BITS ? UINT64_MAX << (begin - first) : 0;
  if (end < first + WORD_BITS)
    mask &= end > first ? ~(UINT64_MAX << (end - first)) : 0;
  return mask;
}

/* The first and, behind it, last word or slot that a range touches. */
static unsigned
first_index (uint64_t base, unsigned shift, uint64_t begin)
{
  return begin > base ? (begin - base) >> shift : 0;
}

static unsigned
last_index (uint64_t base, unsigned shift, uint64_t end, unsigned max)
{
  const uint64_t n = ((end - base - 1) >> shift) + 1;

  return MIN (n, max);
}

static void
free_slot (slot *s, unsigned level)
{
  void *p = atomic_load (s);

  if (!is_node (p))
    return;
  if (level > 0)
    for (unsigned i = 0; i < FANOUT; ++i)
      free_slot (&((struct inner *) p)->slots[i], level - 1);
  free (p);
}

/* A node in which all granules of the set are dirty. */
static void *
new_full_node (uint64_t base, unsigned level, uint64_t length)
{
  if (level == 0) {
    struct leaf *leaf = calloc (1, sizeof *leaf);

    for (unsigned w = 0; leaf && w < LEAF_WORDS; ++w)
      atomic_init (&leaf->words[w], word_mask (base, w, base, length));
    return leaf;
  }
  else {
    struct inner *inner = calloc (1, sizeof *inner);

    for (unsigned i = 0; inner && i < FANOUT; ++i)
      if (base + ((uint64_t) i << span_shift (level - 1)) < length)
        atomic_init (&inner->slots[i], FULL);
    return inner;
  }
}

static void *
new_empty_node (unsigned level)
{
  return calloc (1, level == 0 ? sizeof (struct leaf) :
                 sizeof (struct inner));
}

/* Replace expected, NULL or FULL, in a slot.  Returns what is there now. */
static void *
exchange (slot *s, void *expected, void *node)
{
  return atomic_compare_exchange_strong (s, &expected, node) ? node : expected;
}

/* The node in a slot, to set bits in a part of it.  Returns FULL if they
 * are set already, or if memory is short.
 */
static void *
node_to_set (slot *s, unsigned level)
{
  void *p = atomic_load (s), *node, *now;

  if (p)
    return p;
  node = new_empty_node (level);
  now = exchange (s, NULL, node ? node : FULL);
  if (now != node)
    free (node);
  return now;
}

/* The node in a slot, to clear a part of it.  Returns NULL if that is
 * clean already, FULL if memory is short.
 */
static void *
node_to_clear (slot *s, uint64_t base, unsigned level, uint64_t length)
{
  void *p = atomic_load (s), *node, *now;

  if (p != FULL)
    return p;
  node = new_full_node (base, level, length);
  if (!node)
    return FULL;
  now = exchange (s, FULL, node);
  if (now != node)
    free (node);
  return now;
}

static void
set_leaf (struct leaf *leaf, uint64_t base, uint64_t begin, uint64_t end)
{
  const unsigned last = last_index (base, 6, end, LEAF_WORDS);

  for (unsigned w = first_index (base, 6, begin); w < last; ++w) {
    const uint64_t mask = word_mask (base, w, begin, end);

    /* Most writes go where others went before. */
    if ((atomic_load (&leaf->words[w]) & mask) != mask)
      atomic_fetch_or (&leaf->words[w], mask);
  }
}

/* begin < end <= the set's length; both may lie outside the slot's span. */
static void
set_slot (slot *s, uint64_t base, unsigned level, uint64_t begin,
          uint64_t end, uint64_t length)
{
  const uint64_t limit = MIN (span_end (base, level), length);
  void *p;

  if (begin <= base && end >= limit)
    p = exchange (s, NULL, FULL);
  else
    p = node_to_set (s, level);
  if (p == FULL)
    return;
  if (level == 0) {
    set_leaf (p, base, begin, MIN (end, limit));
    return;
  }
  for (unsigned shift = span_shift (level - 1),
         i = first_index (base, shift, begin),
         last = last_index (base, shift, MIN (end, limit), FANOUT);
       i < last; ++i)
    set_slot (&((struct inner *) p)->slots[i], base + ((uint64_t) i << shift),
              level - 1, begin, end, length);
}

static void
clear_leaf (struct leaf *leaf, uint64_t base, uint64_t begin, uint64_t end)
{
  const unsigned last = last_index (base, 6, end, LEAF_WORDS);

  for (unsigned w = first_index (base, 6, begin); w < last; ++w)
    atomic_fetch_and (&leaf->words[w], ~word_mask (base, w, begin, end));
}

static void
clear_slot (slot *s, uint64_t base, unsigned level, uint64_t begin,
            uint64_t end, uint64_t length)
{
  const uint64_t limit = MIN (span_end (base, level), length);
  void *p;

  if (begin <= base && end >= limit)
    p = exchange (s, FULL, NULL);
  else
    p = node_to_clear (s, base, level, length);
  if (!is_node (p))
    return;
  if (level == 0) {
    clear_leaf (p, base, begin, MIN (end, limit));
    return;
  }
  for (unsigned shift = span_shift (level - 1),
         i = first_index (base, shift, begin),
         last = last_index (base, shift, MIN (end, limit), FANOUT);
       i < last; ++i)
    clear_slot (&((struct inner *) p)->slots[i],
                base + ((uint64_t) i << shift), level - 1, begin, end,
                length);
}

static uint64_t
count_slot (slot *s, uint64_t base, unsigned level, uint64_t length)
{
  void *p = atomic_load (s);
  uint64_t n = 0;

  if (!p)
    return 0;
  if (p == FULL)
    return base < length ? MIN (span_end (base, level), length) - base : 0;
  if (level == 0) {
    const struct leaf *leaf = p;

    for (unsigned w = 0; w < LEAF_WORDS; ++w)
      n += __builtin_popcountll (atomic_load_explicit (&leaf->words[w],
                                                       memory_order_relaxed));
    return n;
  }
  for (unsigned i = 0; i < FANOUT; ++i)
    n += count_slot (&((struct inner *) p)->slots[i],
                     base + ((uint64_t) i << span_shift (level - 1)),
                     level - 1, length);
  return n;
}

static uint64_t
find_in_leaf (const struct leaf *leaf, uint64_t base, uint64_t from,
              uint64_t stop, bool dirty)
{
  const unsigned last = last_index (base, 6, stop, LEAF_WORDS);

  for (unsigned w = first_index (base, 6, from); w < last; ++w) {
    uint64_t word = atomic_load (&leaf->words[w]);

    if (!dirty)
      word = ~word;
    word &= word_mask (base, w, from, UINT64_MAX);
    if (word)
      return base + w * WORD_BITS + __builtin_ctzll (word);
  }
  return span_end (base, 0);
}

/* The first bit at or behind from that is dirty, or clean; if there is none
 * before stop in the slot's span, any from there on, or the span's end.
 */
static uint64_t
find_in_slot (slot *s, uint64_t base, unsigned level, uint64_t from,
              uint64_t stop, bool dirty)
{
  const uint64_t end = span_end (base, level);
  void *p = atomic_load (s);

  if (!is_node (p))
    return (p == FULL) == dirty ? MAX (base, from) : end;
  if (level == 0)
    return find_in_leaf (p, base, from, stop, dirty);
  for (unsigned shift = span_shift (level - 1),
         i = first_index (base, shift, from),
         last = last_index (base, shift, stop, FANOUT); i < last; ++i) {
    const uint64_t child = base + ((uint64_t) i << shift);
    const uint64_t found = find_in_slot (&((struct inner *) p)->slots[i],
                                         child, level - 1, from, stop,
                                         dirty);

    if (found < span_end (child, level - 1))
      return found;
  }
  return end;
}

/* The first granule at or behind from that is dirty, or clean; stop, which
 * is at most the set's length, if there is none before.
 */
static uint64_t
find_before (struct dirty_bits *bits, uint64_t from, uint64_t stop, bool dirty)
{
  const uint64_t found = find_in_slot (&bits->root, 0, bits->levels, from,
                                       stop, dirty);

  return MIN (found, stop);
}

static uint64_t
find (struct dirty_bits *bits, uint64_t from, bool dirty)
{
  return find_before (bits, from, bits->length, dirty);
}

/* Copy what is in a slot to another, of a tree that nobody else uses. */
static void
copy_slot (slot *to, slot *from, unsigned level)
{
  void *p = atomic_load (from), *node;

  atomic_init (to, p);
  if (!is_node (p))
    return;
  node = new_empty_node (level);
  atomic_init (to, node ? node : FULL);
  if (!node)
    return;
  if (level == 0)
    for (unsigned w = 0; w < LEAF_WORDS; ++w)
      atomic_init (&((struct leaf *) node)->words[w],
                   atomic_load (&((struct leaf *) p)->words[w]));
  else
    for (unsigned i = 0; i < FANOUT; ++i)
      copy_slot (&((struct inner *) node)->slots[i],
                 &((struct inner *) p)->slots[i], level - 1);
}

/* What all of a leaf is, NULL or FULL; else the leaf. */
static void *
uniform_leaf (struct leaf *leaf, uint64_t base, uint64_t length)
{
  bool clean = true, dirty = true;

  for (unsigned w = 0; w < LEAF_WORDS; ++w) {
    const uint64_t word = atomic_load (&leaf->words[w]);

    clean &= word == 0;
    dirty &= word == word_mask (base, w, base, length);
  }
  return clean ? NULL : dirty ? FULL : leaf;
}

static void *
uniform_inner (struct inner *inner, uint64_t base, unsigned level,
               uint64_t length)
{
  bool clean = true, dirty = true;

  for (unsigned i = 0; i < FANOUT; ++i) {
    const void *p = atomic_load (&inner->slots[i]);

    clean &= p == NULL;
    if (base + ((uint64_t) i << span_shift (level - 1)) < length)
      dirty &= p == FULL;
  }
  return clean ? NULL : dirty ? FULL : inner;
}

static void
compact_slot (slot *s, uint64_t base, unsigned level, uint64_t length)
{
  void *p = atomic_load (s), *now;

  if (!is_node (p))
    return;
  if (level > 0)
    for (unsigned i = 0; i < FANOUT; ++i)
      compact_slot (&((struct inner *) p)->slots[i],
                    base + ((uint64_t) i << span_shift (level - 1)),
                    level - 1, length);
  now = level == 0 ? uniform_leaf (p, base, length) :
    uniform_inner (p, base, level, length);
  if (now != p) {
    atomic_store (s, now);
    free (p);
  }
}

static uint64_t
granules (uint64_t size, unsigned granularity_bits)
{
  const uint64_t partial = size & ((UINT64_C (1) << granularity_bits) - 1);

  return (size >> granularity_bits) + (partial > 0);
}

struct dirty_bits *
dirty_bits_new (uint64_t size, unsigned granularity_bits)
{
  struct dirty_bits *bits = g_new0 (struct dirty_bits, 1);

  g_assert (granularity_bits >= DIRTY_MIN_GRANULARITY_BITS &&
            granularity_bits <= DIRTY_MAX_GRANULARITY_BITS);
  bits->size = size;
  bits->granularity_bits = granularity_bits;
  bits->length = granules (size, granularity_bits);
  bits->levels = levels_for (bits->length);
  return bits;
}

void
dirty_bits_free (struct dirty_bits *bits)
{
  if (!bits)
    return;
  free_slot (&bits->root, bits->levels);
  g_free (bits);
}

struct dirty_bits *
dirty_bits_copy (struct dirty_bits *bits)
{
  struct dirty_bits *copy = dirty_bits_new (bits->size,
                                            bits->granularity_bits);

  copy_slot (&copy->root, &bits->root, bits->levels);
  return copy;
}

uint64_t
dirty_bits_size (const struct dirty_bits *bits)
{
  return bits->size;
}

unsigned
dirty_bits_granularity_bits (const struct dirty_bits *bits)
{
  return bits->granularity_bits;
}

uint64_t
dirty_bits_length (const struct dirty_bits *bits)
{
  return bits->length;
}

/* The end of a range of bytes, on the disk. */
static uint64_t
range_end (const struct dirty_bits *bits, uint64_t offset, uint64_t count)
{
  return offset < bits->size ? offset + MIN (count, bits->size - offset) : 0;
}


/* The slot whose leaf has a bit, or the FULL or NULL one above it. */
static void *
find_leaf (struct dirty_bits *bits, uint64_t bit)
{
  void *p = atomic_load (&bits->root);

  for (unsigned level = bits->levels; level > 0 && is_node (p); --level) {
    const uint64_t i = bit >> span_shift (level - 1);

    p = atomic_load (&((struct inner *) p)->slots[i % FANOUT]);
  }
  return p;
}

/* Most writes are small, and go where others went before: is all of the
 * range, which lies in one word, dirty already?
 */
static bool
is_dirty_word (struct dirty_bits *bits, uint64_t begin, uint64_t end)
{
  const uint64_t base = begin / LEAF_BITS * LEAF_BITS;
  const unsigned w = (begin - base) / WORD_BITS;
  const uint64_t mask = word_mask (base, w, begin, end);
  const void *p = find_leaf (bits, begin);

  return p == FULL ||
    (p && (atomic_load (&((const struct leaf *) p)->words[w]) & mask) == mask);
}

void
dirty_bits_set (struct dirty_bits *bits, uint64_t offset, uint64_t count)
{
  const uint64_t bytes_end = range_end (bits, offset, count);
  uint64_t begin, end;

  if (bytes_end <= offset)
    return;
  begin = offset >> bits->granularity_bits;
  end = ((bytes_end - 1) >> bits->granularity_bits) + 1;
  if (begin / WORD_BITS != (end - 1) / WORD_BITS ||
      !is_dirty_word (bits, begin, end))
    set_slot (&bits->root, 0, bits->levels, begin, end, bits->length);
}

void
dirty_bits_clear (struct dirty_bits *bits, uint64_t offset, uint64_t count)
{
  const uint64_t end = range_end (bits, offset, count);
  const uint64_t begin_bit = granules (offset, bits->granularity_bits);
  const uint64_t end_bit =
    end == bits->size ? bits->length : end >> bits->granularity_bits;

  if (end > offset && end_bit > begin_bit)
    clear_slot (&bits->root, 0, bits->levels, begin_bit, end_bit,
                bits->length);
}

bool
dirty_bits_get (struct dirty_bits *bits, uint64_t offset, uint64_t *length)
{
  const uint64_t bit = offset >> bits->granularity_bits;
  const bool dirty = find_before (bits, bit, bit + 1, true) == bit;

  if (length) {
    const uint64_t next = find (bits, bit + 1, !dirty);
    const uint64_t end = next == bits->length ? bits->size :
      next << bits->granularity_bits;

    *length = end - offset;
  }
  return dirty;
}

bool
dirty_bits_all (struct dirty_bits *bits, uint64_t offset, uint64_t count)
{
  const uint64_t end = granules (offset + count, bits->granularity_bits);

  if (offset > bits->size || count > bits->size - offset)
    return false;
  return find_before (bits, offset >> bits->granularity_bits, end,
                      false) == end;
}

uint64_t
dirty_bits_count (struct dirty_bits *bits)
{
  return count_slot (&bits->root, 0, bits->levels, bits->length);
}

void
dirty_bits_merge (struct dirty_bits *target, struct dirty_bits *source)
{
  uint64_t begin = 0, end;

  if (target == source)
    return;
  while ((begin = find (source, begin, true)) < source->length) {
    end = find (source, begin, false);
    if (end == begin)           /* cleared meanwhile */
      end++;
    dirty_bits_set (target, begin << source->granularity_bits,
                    (end - begin) << source->granularity_bits);
    begin = end;
  }
}

bool
dirty_bits_includes (struct dirty_bits *all, struct dirty_bits *part)
{
  uint64_t begin = 0, end, offset;

  while ((begin = find (part, begin, true)) < part->length) {
    end = find (part, begin, false);
    if (end == begin)           /* cleared meanwhile */
      end++;
    offset = begin << part->granularity_bits;
    if (!dirty_bits_all (all, offset,
                         MIN ((end - begin) << part->granularity_bits,
                              part->size - offset)))
      return false;
    begin = end;
  }
  return true;
}

/* Let the tree have more levels, or fewer of which it does not need the
 * others.
 */
static void
set_levels (struct dirty_bits *bits, unsigned levels)
{
  for (; bits->levels < levels; bits->levels++) {
    void *p = atomic_load (&bits->root);
    struct inner *inner;

    if (!p)
      continue;
    inner = new_empty_node (bits->levels + 1);
    if (inner)
      atomic_init (&inner->slots[0], p);
    else
      free_slot (&bits->root, bits->levels);
    atomic_store (&bits->root, inner ? (void *) inner : FULL);
  }
  for (; bits->levels > levels; bits->levels--) {
    void *p = atomic_load (&bits->root);

    if (is_node (p)) {
      struct inner *inner = p;

      atomic_store (&bits->root, atomic_load (&inner->slots[0]));
      for (unsigned i = 1; i < FANOUT; ++i)
        free_slot (&inner->slots[i], bits->levels - 1);
      free (inner);
    }
  }
}

void
dirty_bits_resize (struct dirty_bits *bits, uint64_t size, bool dirty)
{
  const uint64_t old_size = bits->size, old_length = bits->length;
  const uint64_t length = granules (size, bits->granularity_bits);

  /* What a FULL slot holds behind the end comes to light: make that clean.
   * A disk that got shorter leaves bits behind its end.
   */
  if (length > old_length) {
    set_levels (bits, levels_for (length));
    bits->length = length;
    clear_slot (&bits->root, 0, bits->levels, old_length, length, length);
  }
  else if (length < old_length) {
    clear_slot (&bits->root, 0, bits->levels, length, old_length, old_length);
    set_levels (bits, levels_for (length));
    bits->length = length;
  }
  bits->size = size;
  if (dirty && size > old_size)
    dirty_bits_set (bits, old_size, size - old_size);
}

void
dirty_bits_compact (struct dirty_bits *bits)
{
  compact_slot (&bits->root, 0, bits->levels, bits->length);
}

static void
export_leaf (struct dirty_bits *bits, uint64_t base, uint64_t *words,
             size_t n)
{
  const void *p = base < bits->length ? find_leaf (bits, base) : NULL;

  for (size_t w = 0; w < n; ++w) {
    uint64_t word = 0;

    if (p == FULL)
      word = word_mask (base, w, base, bits->length);
    else if (p)
      word = atomic_load (&((const struct leaf *) p)->words[w]);
    words[w] = GUINT64_TO_LE (word);
  }
}

void
dirty_bits_export (struct dirty_bits *bits, uint64_t first, void *buf,
                   size_t bytes)
{
  uint64_t words[LEAF_WORDS];

  for (size_t done = 0, n; done < bytes; done += n) {
    n = MIN (bytes - done, sizeof words);
    export_leaf (bits, first + done * 8, words, (n + 7) / 8);
    memcpy ((char *) buf + done, words, n);
  }
}

/* Add the bits of a word. */
static void
import_word (struct dirty_bits *bits, uint64_t first, uint64_t word)
{
  while (word) {
    const unsigned begin = __builtin_ctzll (word);
    const uint64_t rest = ~(word >> begin);
    const unsigned n = rest ? __builtin_ctzll (rest) : WORD_BITS;

    if (first + begin >= bits->length)
      return;
    set_slot (&bits->root, 0, bits->levels, first + begin,
              MIN (first + begin + n, bits->length), bits->length);
    if (begin + n >= WORD_BITS)
      return;
    word &= UINT64_MAX << (begin + n);
  }
}

void
dirty_bits_import (struct dirty_bits *bits, uint64_t first, const void *buf,
                   size_t bytes)
{
  for (size_t done = 0; done < bytes; done += sizeof (uint64_t)) {
    uint64_t word = 0;

    memcpy (&word, (const char *) buf + done,
            MIN (bytes - done, sizeof word));
    import_word (bits, first + done * 8, GUINT64_FROM_LE (word));
  }
}

char *
dirty_bits_sha256 (struct dirty_bits *bits)
{
  g_autoptr (GChecksum) sum = g_checksum_new (G_CHECKSUM_SHA256);
  const uint64_t words = MAX (granules (bits->length, 6), 1);
  uint64_t buf[LEAF_WORDS];

  for (uint64_t done = 0; done < words; done += LEAF_WORDS) {
    const size_t n = MIN (words - done, LEAF_WORDS) * sizeof buf[0];

    dirty_bits_export (bits, done * WORD_BITS, buf, n);
    g_checksum_update (sum, (const guchar *) buf, n);
  }
  return g_strdup (g_checksum_get_string (sum));
}
