/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Nodes, what may be done to their bitmaps, transactions, and gates. */

#include <config.h>

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "dirty/transaction.h"

#define SIZE (UINT64_C (64) << 20)

/* Begin a transaction on these nodes, and end it. */
static struct dirty_transaction *
begin (struct dirty_node *a, struct dirty_node *b)
{
  g_autoptr (GPtrArray) nodes = g_ptr_array_new ();

  g_ptr_array_add (nodes, a);
  if (b)
    g_ptr_array_add (nodes, b);
  dirty_changes_lock ();
  dirty_lock ();
  return dirty_transaction_begin (nodes);
}

static void
commit (struct dirty_transaction *t)
{
  g_autoptr (GError) error = NULL;

  dirty_transaction_commit (t, &error);
  g_assert_no_error (error);
  dirty_unlock ();
  dirty_changes_unlock ();
}

static void
rollback (struct dirty_transaction *t)
{
  dirty_transaction_abort (t);
  dirty_unlock ();
  dirty_changes_unlock ();
}

static struct dirty_node *
open_node (const char *name, uint64_t size)
{
  struct dirty_node *node = dirty_node_of_export (name);
  g_autoptr (GError) error = NULL;

  dirty_node_open (node, size, DIRTY_WRITABLE, &error);
  g_assert_no_error (error);
  return node;
}

static void
two_nodes (struct dirty_node **a, struct dirty_node **b)
{
  g_assert_cmpint (dirty_nodes_config ("exports", "each", NULL), ==, 1);
  *a = open_node ("a", SIZE);
  *b = open_node ("b", SIZE);
}

static void
add (struct dirty_node *node, const char *name)
{
  struct dirty_transaction *t = begin (node, NULL);

  g_assert_cmpint (dirty_bitmap_add (t, node, name, 4096, false, true, NULL),
                   ==, 0);
  commit (t);
}

static void
mark (struct dirty_node *node, uint64_t offset, uint64_t count)
{
  dirty_gate_enter (&node->gates[DIRTY_GATE_TRACKING]);
  dirty_node_mark (node, offset, count);
  dirty_gate_leave (&node->gates[DIRTY_GATE_TRACKING]);
}

static uint64_t
count_of (struct dirty_node *node, const char *name)
{
  const struct dirty_bitmap *bitmap = dirty_bitmap_find (node, name, NULL);

  g_assert_nonnull (bitmap);
  return dirty_bits_count (bitmap->bits);
}

/* The action failed, and said why. */
static void
failed (int r, GError **error, int code, const char *words)
{
  g_assert_cmpint (r, ==, -1);
  g_assert_error (*error, DIRTY_ERROR, code);
  g_assert_nonnull (strstr ((*error)->message, words));
  g_clear_error (error);
}

static void
test_names (void)
{
  g_autoptr (GError) error = NULL;
  struct dirty_node *a, *b;

  g_assert_cmpint (dirty_nodes_config ("file", "x", NULL), ==, 0);
  g_assert_cmpint (dirty_nodes_config ("exports", "some", &error), ==, -1);
  g_assert_nonnull (strstr (error->message, "some"));
  dirty_nodes_config ("exports", "one", NULL);
  dirty_nodes_rename ("sda");
  g_assert_true (dirty_node_of_export ("x") == dirty_node_of_export (""));
  g_assert_cmpstr (dirty_node_of_export ("")->name, ==, "sda");
  dirty_nodes_forget_all ();
  two_nodes (&a, &b);
  g_assert_true (a != b);
  g_assert_cmpstr (b->name, ==, "b");
  g_assert_true (dirty_node_find ("b", NULL) == b);
  g_assert_null (dirty_node_find ("disk", NULL));
  dirty_nodes_forget_all ();
}

static void
test_rules (void)
{
  g_autoptr (GError) error = NULL;
  g_autofree char *long_name = g_strnfill (DIRTY_MAX_NAME + 1, 'x');
  struct dirty_node *a, *b, *unopened;
  struct dirty_transaction *t;
  struct dirty_bitmap *busy;
  struct dirty_bits *copy;

  two_nodes (&a, &b);
  unopened = dirty_node_of_export ("unopened");
  add (a, "one");
  add (a, "busy");
  copy = dirty_bitmap_use (a, "busy", &busy, &error);
  t = begin (a, b);
#define ADD(node, name, granularity) \
  dirty_bitmap_add (t, node, name, granularity, false, true, &error)
  failed (ADD (a, "one", 0), &error, EEXIST, "'one' of node 'a'");
  failed (ADD (a, "", 0), &error, EINVAL, "empty");
  failed (ADD (a, long_name, 0), &error, EINVAL, "1024");
  failed (ADD (a, "two", 1000), &error, EINVAL, "1000");
  failed (ADD (a, "two", 256), &error, EINVAL, "256");
  failed (ADD (a, "two", UINT64_C (1) << 32), &error, EINVAL, "4294967296");
  failed (ADD (unopened, "two", 0), &error, EINVAL, "unopened");
  failed (dirty_bitmap_add (t, a, "two", 0, true, true, &error), &error,
          ENOTSUP, "persistent");
  failed (dirty_bitmap_remove (t, a, "two", &error), &error, ENOENT,
          "'two' not found in node 'a'");
  failed (dirty_bitmap_remove (t, a, "busy", &error), &error, EBUSY,
          "'busy' of node 'a'");
  failed (dirty_bitmap_clear (t, a, "busy", &error), &error, EBUSY, "busy");
  failed (dirty_bitmap_record (t, a, "busy", false, &error), &error, EBUSY,
          "busy");
  failed (dirty_bitmap_merge (t, a, "busy", a, "one", &error), &error, EBUSY,
          "busy");
  failed (dirty_bitmap_move (t, a, "busy", b, "busy", &error), &error, EBUSY,
          "busy");
  failed (dirty_bitmap_move (t, a, "one", a, "busy", &error), &error, EEXIST,
          "busy");
  g_assert_cmpint (dirty_bitmap_merge (t, a, "one", a, "busy", NULL), ==, 0);

  dirty_bitmap_find (a, "one", NULL)->inconsistent = true;
  failed (dirty_bitmap_clear (t, a, "one", &error), &error, EINVAL,
          "inconsistent");
  failed (dirty_bitmap_record (t, a, "one", true, &error), &error, EINVAL,
          "inconsistent");
  dirty_bitmap_find (a, "one", NULL)->inconsistent = false;

  a->read_only = true;
  failed (ADD (a, "two", 0), &error, EROFS, "'a' is read-only");
  failed (dirty_bitmap_clear (t, a, "one", &error), &error, EROFS,
          "'one' of node 'a' is read-only");
  failed (dirty_bitmap_remove (t, a, "one", &error), &error, EROFS, "one");
  g_assert_cmpint (dirty_bitmap_record (t, a, "one", false, NULL), ==, 0);
  g_assert_cmpint (dirty_bitmap_record (t, a, "one", true, NULL), ==, 0);
#undef ADD
  commit (t);
  dirty_bits_free (copy);
  dirty_bitmap_unuse (busy);
  dirty_nodes_forget_all ();
}

/* All that can be seen of a node. */
static char *
describe (struct dirty_node *node)
{
  GString *text = g_string_new (NULL);

  for (guint i = 0; i < node->bitmaps->len; ++i) {
    const struct dirty_bitmap *bitmap = g_ptr_array_index (node->bitmaps, i);
    g_autofree char *sum = dirty_bits_sha256 (bitmap->bits);

    g_assert_true (bitmap->node == node);
    g_string_append_printf (text, "%s %d %u %s\n", bitmap->name,
                            bitmap->recording,
                            dirty_bits_granularity_bits (bitmap->bits), sum);
  }
  return g_string_free (text, FALSE);
}

static void
random_action (struct dirty_transaction *t, struct dirty_node *a,
               struct dirty_node *b)
{
  static const char *const names[] = { "n1", "n2", "n3", "n4" };
  struct dirty_node *node = g_random_boolean () ? a : b;
  struct dirty_node *other = g_random_boolean () ? a : b;
  const char *name = names[g_random_int () % 4];
  const char *other_name = names[g_random_int () % 4];

  /* Some fail, without any effect. */
  switch (g_random_int () % 6) {
  case 0:
    dirty_bitmap_add (t, node, name, UINT64_C (512) << g_random_int () % 12,
                      false, g_random_boolean (), NULL);
    break;
  case 1:
    dirty_bitmap_remove (t, node, name, NULL);
    break;
  case 2:
    dirty_bitmap_clear (t, node, name, NULL);
    break;
  case 3:
    dirty_bitmap_record (t, node, name, g_random_boolean (), NULL);
    break;
  case 4:
    dirty_bitmap_merge (t, node, name, other, other_name, NULL);
    break;
  case 5:
    dirty_bitmap_move (t, node, name, other, other_name, NULL);
    break;
  }
}

static void
test_undo (void)
{
  struct dirty_node *a, *b;

  two_nodes (&a, &b);
  for (unsigned i = 0; i < 2000; ++i) {
    g_autofree char *before_a = describe (a), *before_b = describe (b);
    struct dirty_transaction *t = begin (a, b);

    for (unsigned j = g_random_int () % 12; j > 0; --j)
      random_action (t, a, b);
    if (g_random_boolean ()) {
      g_autofree char *after_a = NULL, *after_b = NULL;

      rollback (t);
      after_a = describe (a);
      after_b = describe (b);
      g_assert_cmpstr (after_a, ==, before_a);
      g_assert_cmpstr (after_b, ==, before_b);
    }
    else
      commit (t);
    mark (a, g_random_int () % SIZE, g_random_int () % 100000);
    mark (b, g_random_int () % SIZE, g_random_int () % 100000);
  }
  dirty_nodes_forget_all ();
}

static void
test_sizes (void)
{
  g_autoptr (GError) error = NULL;
  struct dirty_node *a, *b;
  struct dirty_transaction *t;

  two_nodes (&a, &b);
  add (a, "one");
  add (b, "one");
  mark (a, SIZE - 1, 1);
  failed (dirty_node_open (a, SIZE + 1, DIRTY_WRITABLE, &error), &error,
          EINVAL, "exports=each");
  dirty_node_close (a);
  g_assert_cmpint (dirty_node_open (a, SIZE + 4097, DIRTY_READ_ONLY, NULL),
                   ==, 0);
  g_assert_cmpuint (count_of (a, "one"), ==, 3);
  g_assert_true (a->read_only);
  g_assert_cmpint (dirty_node_open (a, SIZE + 4097, DIRTY_UNKNOWN, NULL),
                   ==, 0);
  g_assert_true (a->read_only);
  g_assert_cmpint (dirty_node_open (a, SIZE + 4097, DIRTY_WRITABLE, NULL),
                   ==, 0);
  g_assert_false (a->read_only);
  t = begin (a, b);
  failed (dirty_bitmap_merge (t, a, "one", b, "one", &error), &error, EINVAL,
          "different sizes");
  failed (dirty_bitmap_move (t, a, "one", b, "two", &error), &error, EINVAL,
          "different sizes");
  rollback (t);
  dirty_nodes_forget_all ();
}

/* Writers count what they do, inside the gates, on both disks; each write
 * must be in the bitmap of its time.
 */
#define WRITERS 4
#define ROTATIONS 300

struct load {
  struct dirty_node *nodes[2];
  atomic_uint generation;       /* changed while the gates are closed */
  atomic_bool stop;
  struct dirty_bits *model[2][ROTATIONS + 1];
};

static gpointer
write_at_random (gpointer p)
{
  struct load *load = p;
  GRand *rand = g_rand_new ();

  while (!atomic_load (&load->stop)) {
    const unsigned disk = g_rand_int (rand) % 2;
    struct dirty_gate *gate =
      &load->nodes[disk]->gates[DIRTY_GATE_TRACKING];
    const uint64_t offset = g_rand_int (rand) % SIZE;

    dirty_gate_enter (gate);
    dirty_node_mark (load->nodes[disk], offset, 1);
    dirty_bits_set (load->model[disk][atomic_load (&load->generation)],
                    offset, 1);
    dirty_gate_leave (gate);
  }
  g_rand_free (rand);
  return NULL;
}

static struct dirty_transaction *
begin_rotation (struct load *load, unsigned n)
{
  struct dirty_transaction *t = begin (load->nodes[0], load->nodes[1]);
  g_autofree char *old = g_strdup_printf ("b%u", n);
  g_autofree char *new = g_strdup_printf ("b%u", n + 1);

  for (unsigned disk = 0; disk < 2; ++disk) {
    dirty_bitmap_record (t, load->nodes[disk], old, false, NULL);
    dirty_bitmap_add (t, load->nodes[disk], new, 4096, false, true, NULL);
  }
  return t;
}

/* Sometimes at the second try. */
static void
rotate (struct load *load)
{
  const unsigned n = atomic_load (&load->generation);
  struct dirty_transaction *t = begin_rotation (load, n);

  if (n % 3 == 0) {
    rollback (t);
    t = begin_rotation (load, n);
  }
  for (unsigned disk = 0; disk < 2; ++disk)
    load->model[disk][n + 1] = dirty_bits_new (SIZE, 12);
  atomic_store (&load->generation, n + 1);
  commit (t);
}

static void
compare_generations (struct load *load)
{
  for (unsigned disk = 0; disk < 2; ++disk)
    for (unsigned i = 0; i <= ROTATIONS; ++i) {
      const struct dirty_bitmap *bitmap =
        g_ptr_array_index (load->nodes[disk]->bitmaps, i);
      g_autofree char *got = dirty_bits_sha256 (bitmap->bits);
      g_autofree char *expected =
        dirty_bits_sha256 (load->model[disk][i]);

      g_assert_cmpstr (got, ==, expected);
      dirty_bits_free (load->model[disk][i]);
    }
}

static void
test_rotation (void)
{
  struct load *load = g_new0 (struct load, 1);
  GThread *threads[WRITERS];

  two_nodes (&load->nodes[0], &load->nodes[1]);
  for (unsigned disk = 0; disk < 2; ++disk) {
    add (load->nodes[disk], "b0");
    load->model[disk][0] = dirty_bits_new (SIZE, 12);
  }
  for (unsigned i = 0; i < WRITERS; ++i)
    threads[i] = g_thread_new ("writer", write_at_random, load);
  for (unsigned i = 0; i < ROTATIONS; ++i) {
    rotate (load);
    g_usleep (200);
  }
  atomic_store (&load->stop, true);
  for (unsigned i = 0; i < WRITERS; ++i)
    g_thread_join (threads[i]);
  compare_generations (load);
  g_free (load);
  dirty_nodes_forget_all ();
}

int
main (int argc, char *argv[])
{
  g_test_init (&argc, &argv, NULL);
  g_test_add_func ("/node/names", test_names);
  g_test_add_func ("/node/rules", test_rules);
  g_test_add_func ("/node/undo", test_undo);
  g_test_add_func ("/node/sizes", test_sizes);
  g_test_add_func ("/node/rotation", test_rotation);
  return g_test_run ();
}
