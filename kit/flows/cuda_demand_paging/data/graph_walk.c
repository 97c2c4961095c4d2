/* A small program with the access patterns that make demand paging interesting: build a hash
 * table (scattered writes), a graph in compressed rows (sequential writes), walk it breadth first
 * (scattered reads), sort the nodes by distance (several write fronts), look some keys up again.
 * Its page accesses are recorded in graph_walk.npz beside this file. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { NODES = 6000, DEGREE = 4, SLOTS = 1 << 17, LOOKUPS = 6000 };

static uint64_t state = 88172645463325252ull;

static uint32_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 24);
}

static void build_table(uint64_t *table)
{
    for (uint32_t node = 1; node <= NODES; node++) {
        uint32_t slot = (node * 2654435761u) >> 15;
        while (table[slot])
            slot = (slot + 1) % SLOTS;
        table[slot] = ((uint64_t)node << 32) | next_random();
    }
}

static uint64_t look_up(const uint64_t *table)
{
    uint64_t sum = 0;
    for (int i = 0; i < LOOKUPS; i++) {
        uint32_t node = 1 + next_random() % NODES, slot = (node * 2654435761u) >> 15;
        while (table[slot] && table[slot] >> 32 != node)
            slot = (slot + 1) % SLOTS;
        sum += (uint32_t)table[slot];
    }
    return sum;
}

static void build_graph(uint32_t *row, uint32_t *edge)
{
    for (uint32_t node = 0, at = 0; node <= NODES; node++) {
        row[node] = at;
        for (int i = 0; node < NODES && i < DEGREE; i++)
            edge[at++] = next_random() % NODES;
    }
}

static uint32_t walk(const uint32_t *row, const uint32_t *edge, uint32_t *distance, uint32_t *queue)
{
    uint32_t head = 0, tail = 0;
    queue[tail++] = 0;
    distance[0] = 1;
    while (head < tail) {
        uint32_t node = queue[head++];
        for (uint32_t i = row[node]; i < row[node + 1]; i++)
            if (!distance[edge[i]]) {
                distance[edge[i]] = distance[node] + 1;
                queue[tail++] = edge[i];
            }
    }
    return tail;
}

static void sort_by_distance(const uint32_t *distance, uint32_t *order)
{
    uint32_t start[66] = {0};
    for (uint32_t node = 0; node < NODES; node++)
        start[distance[node] + 1]++;
    for (int i = 1; i < 66; i++)
        start[i] += start[i - 1];
    for (uint32_t node = 0; node < NODES; node++)
        order[start[distance[node]]++] = node;
}

int main(void)
{
    uint64_t *table = calloc(SLOTS, sizeof *table);
    uint32_t *row = malloc((NODES + 1) * sizeof *row), *edge = malloc(NODES * DEGREE * sizeof *edge);
    uint32_t *distance = calloc(NODES, sizeof *distance), *queue = malloc(NODES * sizeof *queue);
    build_table(table);
    build_graph(row, edge);
    uint32_t reached = walk(row, edge, distance, queue);
    sort_by_distance(distance, queue);
    printf("reached %u, furthest %u, sum %llu\n", reached, distance[queue[NODES - 1]], (unsigned long long)look_up(table));
    return 0;
}
