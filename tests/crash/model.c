/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crash/model.h"

static void
bitmap_free (gpointer p)
{
  struct model_bitmap *bitmap = p;

  dirty_bits_free (bitmap->exact);
  dirty_bits_free (bitmap->needed);
  g_free (bitmap->name);
  g_free (bitmap);
}

static GPtrArray *
list_new (void)
{
  return g_ptr_array_new_with_free_func (bitmap_free);
}

static void
list_unref (gpointer list)
{
  g_ptr_array_unref (list);
}

static gpointer
copy_bitmap (gconstpointer p, gpointer opaque)
{
  const struct model_bitmap *bitmap = p;
  struct model_bitmap *copy = g_new (struct model_bitmap, 1);

  *copy = *bitmap;
  copy->name = g_strdup (bitmap->name);
  copy->exact = dirty_bits_copy (bitmap->exact);
  copy->needed = dirty_bits_copy (bitmap->needed);
  return copy;
}

GPtrArray *
model_copy (const GPtrArray *list)
{
  GPtrArray *copy = list_new ();

  for (guint i = 0; i < list->len; ++i)
    g_ptr_array_add (copy, copy_bitmap (g_ptr_array_index (list, i), NULL));
  return copy;
}

static void
moment_clear (gpointer p)
{
  struct model_moment *moment = p;

  for (unsigned d = 0; d < MODEL_DISKS; ++d)
    g_ptr_array_unref (moment->states[d]);
  g_array_unref (moment->ids);
}

struct model *
model_new (unsigned disks, bool intent)
{
  struct model *m = g_new0 (struct model, 1);

  m->disks = disks;
  m->intent = intent;
  for (unsigned d = 0; d < MODEL_DISKS; ++d) {
    m->now[d] = list_new ();
    m->others[d] = g_ptr_array_new_with_free_func (list_unref);
  }
  m->optional = g_hash_table_new (NULL, NULL);
  m->moments = g_array_new (FALSE, FALSE, sizeof (struct model_moment));
  g_array_set_clear_func (m->moments, moment_clear);
  return m;
}

void
model_free (struct model *m)
{
  for (unsigned d = 0; d < MODEL_DISKS; ++d) {
    g_ptr_array_unref (m->now[d]);
    g_ptr_array_unref (m->others[d]);
  }
  g_hash_table_unref (m->optional);
  g_array_unref (m->moments);
  g_free (m);
}

struct model_bitmap *
model_add (struct model *m, GPtrArray *list, const char *name, uint64_t size,
           unsigned granularity_bits)
{
  struct model_bitmap *bitmap = g_new0 (struct model_bitmap, 1);

  bitmap->id = ++m->last_id;
  bitmap->name = g_strdup (name);
  bitmap->exact = dirty_bits_new (size, granularity_bits);
  bitmap->needed = dirty_bits_new (size, granularity_bits);
  g_ptr_array_add (list, bitmap);
  return bitmap;
}

struct model_bitmap *
model_find (const GPtrArray *list, const char *name)
{
  for (guint i = 0; i < list->len; ++i) {
    struct model_bitmap *bitmap = g_ptr_array_index (list, i);

    if (strcmp (bitmap->name, name) == 0)
      return bitmap;
  }
  return NULL;
}

static struct model_bitmap *
find_id (const GPtrArray *list, unsigned id)
{
  for (guint i = 0; i < list->len; ++i) {
    struct model_bitmap *bitmap = g_ptr_array_index (list, i);

    if (bitmap->id == id)
      return bitmap;
  }
  return NULL;
}

void
model_learn (struct model *m, unsigned disk, const struct dirty_node *node)
{
  for (guint i = 0; i < node->bitmaps->len; ++i) {
    const struct dirty_bitmap *found = g_ptr_array_index (node->bitmaps, i);
    struct model_bitmap *bitmap =
      model_add (m, m->now[disk], found->name, node->size,
                 dirty_bits_granularity_bits (found->bits));

    bitmap->persistent = true;
    bitmap->recording = found->recording;
    bitmap->inconsistent = found->inconsistent;
    dirty_bits_merge (bitmap->exact, found->bits);
    dirty_bits_merge (bitmap->needed, found->bits);
  }
}

void
model_note (struct model *m, guint event)
{
  struct model_moment moment = {
    .event = event, .ids = g_array_new (FALSE, FALSE, sizeof (unsigned)),
  };

  for (unsigned d = 0; d < MODEL_DISKS; ++d) {
    moment.states[d] = g_ptr_array_new_with_free_func (list_unref);
    g_ptr_array_add (moment.states[d], model_copy (m->now[d]));
    for (guint i = 0; i < m->others[d]->len; ++i)
      g_ptr_array_add (moment.states[d],
                       model_copy (g_ptr_array_index (m->others[d], i)));
    for (guint i = 0; i < m->now[d]->len; ++i) {
      const struct model_bitmap *bitmap = g_ptr_array_index (m->now[d], i);

      if (bitmap->persistent &&
          !g_hash_table_contains (m->optional,
                                  GUINT_TO_POINTER (bitmap->id)))
        g_array_append_val (moment.ids, bitmap->id);
    }
    moment.used[d] = m->used[d];
    moment.clean[d] = m->clean[d];
  }
  g_array_append_val (m->moments, moment);
}

static bool
records (const struct model_bitmap *bitmap)
{
  return bitmap->recording && !bitmap->inconsistent;
}

void
model_mark (struct model *m, unsigned disk, bool inactive, uint64_t offset,
            uint64_t count)
{
  for (guint i = 0; i < m->now[disk]->len; ++i) {
    struct model_bitmap *bitmap = g_ptr_array_index (m->now[disk], i);

    if (records (bitmap) && !(inactive && bitmap->persistent))
      dirty_bits_set (bitmap->exact, offset, count);
  }
}

void
model_pass (struct model *m, unsigned disk, uint64_t offset, uint64_t count)
{
  for (guint i = 0; i < m->now[disk]->len; ++i) {
    struct model_bitmap *bitmap = g_ptr_array_index (m->now[disk], i);

    if (!records (bitmap))
      continue;
    dirty_bits_set (bitmap->needed, offset, count);
    for (guint j = 0; j < m->others[disk]->len; ++j) {
      struct model_bitmap *other =
        find_id (g_ptr_array_index (m->others[disk], j), bitmap->id);

      if (other) {
        dirty_bits_set (other->needed, offset, count);
        other->needs_more = true;
      }
    }
  }
}

/* What the container may have before anything else is changed. */
static GPtrArray *
only_add (const GPtrArray *before, const GPtrArray *after)
{
  GPtrArray *list = model_copy (before);

  for (guint i = 0; i < after->len; ++i) {
    const struct model_bitmap *bitmap = g_ptr_array_index (after, i);

    if (!model_find (before, bitmap->name))
      g_ptr_array_add (list, copy_bitmap (bitmap, NULL));
  }
  return list;
}

void
model_begin (struct model *m, GPtrArray *const *after, const bool *touched)
{
  for (unsigned d = 0; d < m->disks; ++d) {
    if (touched[d])
      g_ptr_array_add (m->others[d], model_copy (after[d]));
    if (touched[0] && touched[1])
      g_ptr_array_add (m->others[d], only_add (m->now[d], after[d]));
    for (guint i = 0; i < m->now[d]->len; ++i) {
      const struct model_bitmap *bitmap = g_ptr_array_index (m->now[d], i);
      bool stays = false;

      for (unsigned e = 0; e < m->disks; ++e)
        stays |= find_id (after[e], bitmap->id) != NULL;
      if (!stays)
        g_hash_table_add (m->optional, GUINT_TO_POINTER (bitmap->id));
    }
  }
}

/* What moved between disks can be missing after two failures, that of the
 * transaction and then that of undoing it on one of the disks only.
 */
void
model_fail (struct model *m, GPtrArray *const *after)
{
  for (unsigned d = 0; d < m->disks; ++d)
    for (guint i = 0; i < m->now[d]->len; ++i) {
      const struct model_bitmap *bitmap = g_ptr_array_index (m->now[d], i);

      if (!find_id (after[d], bitmap->id))
        g_hash_table_add (m->optional, GUINT_TO_POINTER (bitmap->id));
    }
}

void
model_succeed (struct model *m, GPtrArray **after, const bool *touched)
{
  for (unsigned d = 0; d < m->disks; ++d) {
    g_ptr_array_unref (m->now[d]);
    m->now[d] = g_steal_pointer (&after[d]);
    if (touched[d])
      model_settle (m, d);
  }
}

void
model_settle (struct model *m, unsigned disk)
{
  g_ptr_array_set_size (m->others[disk], 0);
  for (unsigned d = 0; d < m->disks; ++d)
    if (m->others[d]->len > 0)
      return;
  g_hash_table_remove_all (m->optional);
}

static bool
is_equal (struct dirty_bits *a, struct dirty_bits *b)
{
  return dirty_bits_count (a) == dirty_bits_count (b) &&
    dirty_bits_includes (a, b);
}

void
model_compare (const struct model *m, unsigned disk,
               const struct dirty_node *node, bool inactive)
{
  guint seen = 0;

  for (guint i = 0; i < m->now[disk]->len; ++i) {
    const struct model_bitmap *bitmap = g_ptr_array_index (m->now[disk], i);
    const struct dirty_bitmap *found = dirty_bitmap_find (node, bitmap->name,
                                                          NULL);

    if (inactive && bitmap->persistent)
      continue;
    seen++;
    if (!found || found->persistent != bitmap->persistent ||
        found->inconsistent != bitmap->inconsistent ||
        (!found->inconsistent &&
         (found->recording != bitmap->recording ||
          !is_equal (found->bits, bitmap->exact)))) {
      fprintf (stderr, "disk %u, bitmap %s in memory is not as it must be: "
               "%s\n", disk, bitmap->name, !found ? "missing" :
               found->persistent != bitmap->persistent ? "persistent" :
               found->inconsistent != bitmap->inconsistent ?
               "inconsistent" : found->recording != bitmap->recording ?
               "recording" : "content");
      exit (1);
    }
  }
  if (seen != node->bitmaps->len) {
    fprintf (stderr, "disk %u has %u bitmaps, not %u\n", disk,
             node->bitmaps->len, seen);
    exit (1);
  }
}

/* Judging. */

struct judgement {
  const struct model *m;
  const struct model_moment *moment;
  unsigned disk;
  GString *why;
};

/* Says why not. */
static bool
match_bitmap (const struct judgement *j, const struct model_bitmap *bitmap,
              const struct dirty_bitmap *found)
{
  const bool may_be_inconsistent = bitmap->recording &&
    !bitmap->inconsistent && !j->m->intent && j->moment->used[j->disk];
  const char *wrong = NULL;

  if (!found)
    wrong = "is missing";
  else if (found->recording != bitmap->recording &&
           !(found->inconsistent && bitmap->inconsistent))
    wrong = found->recording ? "records" : "does not record";
  else if (bitmap->inconsistent && !found->inconsistent)
    wrong = "is not inconsistent any more";
  else if (found->inconsistent) {
    if (!bitmap->inconsistent && !may_be_inconsistent)
      wrong = "is inconsistent";
  }
  else if (dirty_bits_granularity_bits (found->bits) !=
           dirty_bits_granularity_bits (bitmap->exact))
    wrong = "has another granularity";
  else if (!dirty_bits_includes (found->bits, bitmap->needed))
    wrong = "lacks writes";
  else if ((j->moment->clean[j->disk] ||
            (!bitmap->recording && !bitmap->needs_more)) &&
           !is_equal (found->bits, bitmap->exact))
    wrong = "has more than it should";
  if (wrong)
    g_string_append_printf (j->why, "  bitmap %s %s\n", bitmap->name, wrong);
  return !wrong;
}

static bool
match_list (const struct judgement *j, const GPtrArray *list,
            const struct dirty_node *node)
{
  guint seen = 0;

  for (guint i = 0; i < list->len; ++i) {
    const struct model_bitmap *bitmap = g_ptr_array_index (list, i);

    if (!bitmap->persistent)
      continue;
    if (!match_bitmap (j, bitmap,
                       dirty_bitmap_find (node, bitmap->name, NULL)))
      return false;
    seen++;
  }
  if (seen == node->bitmaps->len)
    return true;
  g_string_append_printf (j->why, "  there are %u bitmaps, not %u\n",
                          node->bitmaps->len, seen);
  return false;
}

static G_GNUC_NORETURN void
give_up (const struct model_moment *moment, unsigned disk, const char *why)
{
  fprintf (stderr, "after the moment of event %u, disk %u:\n%s",
           moment->event, disk, why);
  exit (1);
}

/* Note the ids of what was found, in any way it can be understood. */
static void
judge_disk (const struct judgement *j, const struct dirty_node *node,
            GHashTable *ids)
{
  const GPtrArray *states = j->moment->states[j->disk];
  bool found = false;

  for (guint i = 0; i < states->len; ++i) {
    const GPtrArray *list = g_ptr_array_index (states, i);

    g_string_append_printf (j->why, " state %u:\n", i);
    if (!match_list (j, list, node))
      continue;
    found = true;
    for (guint k = 0; k < list->len; ++k) {
      const struct model_bitmap *bitmap = g_ptr_array_index (list, k);

      g_hash_table_add (ids, GUINT_TO_POINTER (bitmap->id));
    }
  }
  if (!found)
    give_up (j->moment, j->disk, j->why->str);
}

void
model_judge (const struct model *m, const struct model_moment *moment,
             struct dirty_node *const *nodes)
{
  g_autoptr (GHashTable) ids = g_hash_table_new (NULL, NULL);

  for (unsigned d = 0; d < m->disks; ++d) {
    g_autoptr (GString) why = g_string_new (NULL);
    const struct judgement j = { m, moment, d, why };

    judge_disk (&j, nodes[d], ids);
  }
  for (guint i = 0; i < moment->ids->len; ++i)
    if (!g_hash_table_contains (ids, GUINT_TO_POINTER (
          g_array_index (moment->ids, unsigned, i))))
      give_up (moment, m->disks, "  a bitmap is on none of the disks\n");
}
