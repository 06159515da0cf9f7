/* Scratch memory belongs to a thread, and ends with it: threads come and go (a job's, and those that OpenMP keeps for it), and what they
   left behind would add up. */
#include <pthread.h>

#include "lowbit.h"

static pthread_key_t of_thread; /* the first of the thread's scratches */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int able;

static void give_back(void *first) {
    for (Scratch *scratch = first; scratch; scratch = scratch->next) {
        free(scratch->at);
        scratch->at = NULL, scratch->bytes = 0, scratch->known = 0;
    }
}

static void begin(void) { able = pthread_key_create(&of_thread, give_back) == 0; }

void lowbit_give_back_at_end(Scratch *scratch) {
    pthread_once(&once, begin);
    if (!able) return; /* no key was left: this much memory stays */
    scratch->next = pthread_getspecific(of_thread);
    scratch->known = pthread_setspecific(of_thread, scratch) == 0;
}
