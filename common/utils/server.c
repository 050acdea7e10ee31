/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <signal.h>
#include <string.h>

#include "utils/server.h"

/* Short options of nbdkit which take an argument. */
#define WITH_ARGUMENT "DegiPptuU"

/* Long ones, whose argument may be the next word. */
static const char *const with_argument[] = {
  "--debug", "--export", "--export-name", "--exportname", "--filter",
  "--group", "--ip-addr", "--ipaddr", "--log", "--mask-handshake",
  "--pid-file", "--pidfile", "--port", "--run", "--selinux-label",
  "--threads", "--timeout", "--time-out", "--tls", "--tls-certificates",
  "--tls-psk", "--unix", "--user", NULL
};

/* A word of short options, such as -fr.  Is the next word the argument of
 * the last of them?
 */
static gboolean
look_at_short (const char *word, gboolean *found)
{
  for (const char *p = word + 1; *p; ++p) {
    if (strchr (WITH_ARGUMENT, *p))
      return p[1] == '\0';
    *found |= *p == 'r';
  }
  return FALSE;
}

/* Words end with a NUL each, as the kernel has them. */
static gboolean
find_read_only (const char *words, gsize size)
{
  gboolean found = FALSE, skip = FALSE;

  for (const char *word = words; word < words + size;
       word += strlen (word) + 1) {
    if (skip || word == words)  /* the program */
      skip = FALSE;
    else if (strcmp (word, "--") == 0)
      break;
    else if (word[0] == '-' && word[1] == '-') {
      skip = g_strv_contains (with_argument, word);
      /* It may be abbreviated. */
      found |= g_str_has_prefix (word, "--read") &&
        (g_str_has_prefix ("--read-only", word) ||
         g_str_has_prefix ("--readonly", word));
    }
    else if (word[0] == '-')
      skip = look_at_short (word, &found);
  }
  return found;
}

gboolean
qf_server_is_read_only (void)
{
  g_autofree char *words = NULL;
  gsize size;

  return g_file_get_contents ("/proc/self/cmdline", &words, &size, NULL) &&
    find_read_only (words, size);
}

void
qf_server_allow_limits (void)
{
  struct sigaction action;

  if (sigaction (SIGXFSZ, NULL, &action) == 0 &&
      action.sa_handler == SIG_DFL) {
    action.sa_handler = SIG_IGN;
    sigaction (SIGXFSZ, &action, NULL);
  }
}
