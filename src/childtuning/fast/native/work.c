/* Work on a table of tasks, by as many threads as there are. */
#include "exported.h"

/* kernel(task) for each of num tasks of size bytes; threads take the next one until none is left. */
typedef struct {
    void (*kernel)(const void *task);
    const char *tasks;
    int64_t num, size, next;
} ct_job;

EXPORT void ct_work(ct_job *job) {
    for (int64_t k; (k = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->num;)
        job->kernel(job->tasks + k * job->size);
}
