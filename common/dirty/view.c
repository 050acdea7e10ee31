/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include "dirty/view.h"

static bool clean_is_zero;

bool
dirty_view_clean_is_zero (void)
{
  return clean_is_zero;
}

void
dirty_view_set_clean_is_zero (bool zero)
{
  clean_is_zero = zero;
}

uint32_t
dirty_view_clean_type (void)
{
  return clean_is_zero ? DIRTY_VIEW_HOLE | DIRTY_VIEW_ZERO : DIRTY_VIEW_HOLE;
}

uint32_t
dirty_view_dirty_type (uint32_t type)
{
  /* A hole that is not zero would be taken for a clean block. */
  return !clean_is_zero && (type & DIRTY_VIEW_ZERO) ? type : 0;
}
